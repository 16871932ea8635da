"""Continues a text with the model that train_lm.py has trained, byte by byte through the KV cache.

    python examples/train_lm.py && python examples/generate.py

The prompt is read in chunks, then every byte costs one pass over one token: what the cache holds is
not computed again. On a GPU that pass is a CUDA graph, captured once and replayed while the cache
grows.
"""

import argparse
import codecs
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lm.model import LanguageModel, ModelConfig

PROMPT = """def main() -> None:
    \"\"\"Reads the command line and"""
CHUNK = 1024  # bytes of the prompt at a time: bounds the memory of long prompts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", default=Path("runs/lm/nsa.pt"), help="%(default)s")
    add("--prompt", default=PROMPT, help="text to go on from; default: a line of Python")
    add("--prompt-file", type=Path, help="a file to go on from instead")
    add("--bytes", type=int, default=400, help="bytes to add; default: %(default)s")
    add(
        "--temperature", type=float, default=0.8, help="0: the likeliest byte; default: %(default)s"
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    args = parser.parse_args()
    if args.bytes < 1:
        parser.error("--bytes must be at least 1")
    if args.temperature < 0:
        parser.error("--temperature must not be negative")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.prompt_file:
        args.prompt = args.prompt_file.read_bytes()
    else:
        args.prompt = args.prompt.encode()
    if not args.prompt:
        parser.error("the prompt is empty")
    return args


def load_model(path: Path, device: str) -> LanguageModel:
    if not path.exists():
        raise SystemExit(f"generate.py: there is no checkpoint {path}; train_lm.py writes one")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["config"]["attention"] != "nsa":
        raise SystemExit(f"generate.py: {path} has dense attention, which has no cache here")
    model = LanguageModel(ModelConfig(**state["config"]))
    model.load_state_dict(state["model"])
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


class Decoder:
    """A model and the caches of one text."""

    def __init__(self, model: LanguageModel, max_seqlen: int) -> None:
        self.model = model
        self.caches = model.new_caches(1, max_seqlen)
        self.device = self.caches[0].device
        self.step = self._step

    def read(self, text: bytes) -> torch.Tensor:
        """Reads more text. Logits of the byte after it."""
        tokens = torch.tensor([list(text)], device=self.device)
        for chunk in tokens.split(CHUNK, dim=1):
            logits = self.model(chunk, self.caches)
        return logits[0, -1]

    def _step(self, byte: int) -> torch.Tensor:
        return self.model(torch.tensor([[byte]], device=self.device), self.caches)[0, -1]

    def capture(self) -> None:
        """Makes `step` a CUDA graph."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # on caches of its own: it stores a token
            self.model(token, self.model.new_caches(1, 64))
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.model(token, self.caches)[0, -1]

        def step(byte: int) -> torch.Tensor:
            for cache in self.caches:
                cache.make_room(1)  # the host's share of what the graph does
            token.fill_(byte)
            graph.replay()
            return logits

        self.step: Callable[[int], torch.Tensor] = step


def continuation(
    decoder: Decoder, logits: torch.Tensor, count: int, temperature: float, seed: int
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        logits = logits.float().cpu()
        if temperature:
            p = torch.softmax(logits / temperature, dim=-1)
            byte = int(torch.multinomial(p, 1, generator=generator))
        else:
            byte = int(logits.argmax())
        yield byte
        if i + 1 < count:
            logits = decoder.step(byte)


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    model = load_model(args.checkpoint, args.device)
    decoder = Decoder(model, len(args.prompt) + args.bytes)

    started = time.perf_counter()
    logits = decoder.read(args.prompt).cpu()
    read = time.perf_counter() - started
    if args.device == "cuda":
        decoder.capture()

    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write(args.prompt.decode(errors="replace"))
    started = time.perf_counter()
    for byte in continuation(decoder, logits, args.bytes, args.temperature, args.seed):
        sys.stdout.write(characters.decode(bytes([byte])))
        sys.stdout.flush()
    written = time.perf_counter() - started
    megabytes = sum(cache.nbytes for cache in decoder.caches) / 2**20
    print(
        f"\n---\nread {len(args.prompt):,} bytes at {len(args.prompt) / read:,.0f} tokens/s, wrote "
        f"{args.bytes:,} at {args.bytes / written:,.0f} tokens/s on {args.device}; caches "
        f"{megabytes:.1f} MiB"
    )


if __name__ == "__main__":
    main()
