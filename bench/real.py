"""Selections of a trained model: trains examples/train_lm.py with the benchmark's heads, runs the
model over held-out text, and records what its attention layers get.

By itself it prints how many blocks neighbouring queries share, layer by layer, and writes a
result file; bench/run.py uses it for the inputs "real". The text is the held-out part of what the
model was trained on; where it is shorter than asked for it is repeated, and the rows say how many
bytes it has. The model was trained on windows of --train-length tokens: positions beyond are new
to it.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from attentions import Inputs, selection_of
from common import REPOSITORY, RESULTS, environment, print_table, write_results
from inputs import distinct_blocks, make_inputs, shared_fraction
from torch import nn

import nsa_ext
from nsa_ext._rope import inverse_frequencies, rotary_table, rotate

EXAMPLES = REPOSITORY / "examples"
CHECKPOINT = REPOSITORY / "runs" / "bench" / "nsa.pt"
DISTANCES = (1, 4, 16, 64)
TILES = (4, 8, 12, 16)  # tokens whose common list of blocks is counted


class RotatedCompressor(nn.Module):
    """phi and the rotation of compressed key c to position c*d, as the layer applies them."""

    def __init__(self, layer: nsa_ext.NSAAttention):
        super().__init__()
        self.phi, self.theta, self.config = layer.compress, layer.rope_theta, layer.config

    def forward(self, k, v, cu_seqlens_k=None, max_seqlen_k=None):
        k_cmp, v_cmp = self.phi(k, v, cu_seqlens_k, max_seqlen_k)
        positions = torch.arange(k_cmp.shape[1], device=k.device) * self.config.block_stride
        inv_freq = inverse_frequencies(k.shape[-1], self.theta, k.dtype, k.device)
        table = rotary_table(positions, inv_freq)
        return rotate(k_cmp, table), v_cmp


def train(checkpoint: Path, args: argparse.Namespace) -> None:
    """Trains the model of the benchmark; the log goes to stderr."""
    sizes = {
        "heads": args.heads,
        "kv-heads": args.kv_heads,
        "head-dim": args.head_dim,
        "dim": args.model_dim,
        "layers": args.layers,
        "select-size": 64,
        "num-selected": 16,
        "window": 512,
        "seq-len": args.train_length,
        "batch-size": 1,
        "steps": args.train_steps,
        "eval-every": args.train_steps,
        "lr": 1e-3,
    }
    options = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(EXAMPLES / "train_lm.py"), "--out", str(checkpoint.parent)]
    subprocess.run(
        [*command, "--device", args.device, *options], check=True, stdout=sys.stderr, cwd=REPOSITORY
    )


def load_model(checkpoint: Path, device: str) -> nn.Module:
    sys.path.insert(0, str(EXAMPLES))
    from lm.model import LanguageModel, ModelConfig

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = LanguageModel(ModelConfig(**state["config"]))
    model.load_state_dict(state["model"])
    model.trained_steps = state["step"]
    return model.to(device).eval()


def held_out_text(length: int, device: str) -> tuple[torch.Tensor, int]:
    """(1, length) bytes that the model was not trained on, and how many of them are not repeats."""
    sys.path.insert(0, str(EXAMPLES))
    from lm.data import load_corpus

    text = load_corpus(None, 1).validation
    copies = -(-length // len(text))
    tokens = text.repeat(copies)[:length].long()
    return tokens[None].to(device), min(length, len(text))


@contextlib.contextmanager
def recorded(model: nn.Module, keep: int, calls: list[dict]) -> Iterator[None]:
    """Fills `calls` with what each attention layer chooses; of layer `keep` with its inputs too."""
    original = nsa_ext.attention.sparse_attn

    def record(*args, **kwargs):
        out, blocks = original(*args, return_selection=True, **kwargs)
        call = {"blocks": blocks}
        if len(calls) == keep:
            call |= {"args": args, "kwargs": kwargs}
        calls.append(call)
        return out

    raw = {}

    def remember(module, args):
        raw["k"], raw["v"] = args[:2]

    layer = model.layers[keep].attention
    hook = layer.compress.register_forward_pre_hook(remember)
    with mock.patch.object(nsa_ext.attention, "sparse_attn", record):
        try:
            yield
        finally:
            hook.remove()
    calls[keep]["raw"] = raw


@torch.no_grad()
def record(model: nn.Module, length: int, device: str, keep: int) -> tuple[Inputs, list]:
    """The inputs of layer `keep`, and every layer's block_indices."""
    tokens, fresh = held_out_text(length, device)
    calls: list[dict] = []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with recorded(model, keep, calls), torch.autocast(device, dtype, enabled=device == "cuda"):
        model(tokens)
    q, k, v, gates, _ = calls[keep]["args"]
    kwargs, raw = calls[keep]["kwargs"], calls[keep]["raw"]
    tensors = [q, k, v, gates, raw["k"], raw["v"], kwargs["k_win"], kwargs["v_win"]]
    layer = model.layers[keep].attention
    inputs = Inputs(
        kind="real",
        tensors=[x.detach().to(dtype).contiguous() for x in tensors],
        compress=RotatedCompressor(layer),
        extra=["k_cmp", "v_cmp", "k_win", "v_win"],
        notes={"layer": keep, "text_bytes": fresh, "train_steps": model.trained_steps},
    )
    return inputs, [call["blocks"] for call in calls]


def share_rows(kind: str, layer: int | None, length: int, blocks: torch.Tensor) -> list[dict]:
    """How much queries at a distance share, and how many blocks the queries of a tile name."""
    config = nsa_ext.NSAConfig()
    common = {"what": "selection", "inputs": kind, "layer": layer, "seqlen": length}
    rows = []
    for distance in DISTANCES:
        share = shared_fraction(blocks, config, distance)
        rows.append({**common, "distance": distance, "neighbours_share": round(share, 4)})
    for tokens in TILES:
        loads = distinct_blocks(blocks, tokens) / tokens
        rows.append({**common, "tile": tokens, "blocks_per_token": round(loads, 3)})
    return rows


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        default=CHECKPOINT,
        help="trained anew where there is no such file",
    )
    add("--train-steps", type=int, default=300)
    add("--train-length", type=int, default=8192)
    add("--model-dim", type=int, default=512)
    add("--layers", type=int, default=4)
    add("--layer", type=int, default=2, help="whose tensors are used")


def model_for(args: argparse.Namespace) -> nn.Module:
    if not args.checkpoint.exists():
        train(args.checkpoint, args)
    model = load_model(args.checkpoint, args.device)
    config = model.config
    sizes = (config.heads, config.kv_heads, config.head_dim)
    if sizes != (args.heads, args.kv_heads, args.head_dim):
        raise SystemExit(
            f"{args.checkpoint}: heads, kv heads, head dim are {sizes}, not "
            f"{(args.heads, args.kv_heads, args.head_dim)}; name another --checkpoint"
        )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[8192, 65536])
    add("--heads", type=int, default=64, help="Hq")
    add("--kv-heads", type=int, default=4, help="Hkv")
    add("--head-dim", type=int, default=128)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=RESULTS / "selection.json")
    add_model_options(parser)
    args = parser.parse_args()
    model = model_for(args)
    rows = []
    for length in args.lengths:
        inputs, blocks = record(model, length, args.device, args.layer)
        for layer, chosen in enumerate(blocks):
            for row in share_rows("real", layer, length, chosen):
                rows.append({**row, **{k: v for k, v in inputs.notes.items() if k != "layer"}})
        dtype = inputs.q.dtype
        del inputs, blocks
        for kind in ("random", "coherent"):
            compared = make_inputs(
                kind, 1, length, args.heads, args.kv_heads, args.head_dim, args.head_dim,
                device=args.device, dtype=dtype,
            )  # fmt: skip
            rows += share_rows(kind, None, length, selection_of(compared))
    print_table(
        ["inputs", "layer", "length", "distance", "share", "tile", "blocks/token"],
        [
            [row.get(name) for name in ("inputs", "layer", "seqlen", "distance")]
            + [row.get(name) for name in ("neighbours_share", "tile", "blocks_per_token")]
            for row in rows
        ],
    )
    shape = {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim")}
    write_results(args.output, rows, {**environment(args.device), "shape": shape})


if __name__ == "__main__":
    main()
