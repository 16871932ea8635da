"""Trains a small byte-level language model with sparse (or dense) attention on real text.

With no arguments: a few minutes on two CPU cores, on the Python standard library's own sources.
Writes into --out, for the attention kind KIND (nsa or full):
  KIND.jsonl   first line: the run's settings; then a line per evaluation
  KIND.pt      checkpoint: model, optimizer, model configuration, step
  loss.png     loss curves; where the folder also holds the other kind's log of a run on the
               same text, with the same --seq-len and --batch-size, both are drawn. To compare:
                   python examples/train_lm.py && python examples/train_lm.py --attention full
"""

import argparse
import json
import math
import os
import time
from dataclasses import fields
from pathlib import Path

# Read when torch loads OpenMP. Threads that spin while they wait made a step 2 to 10 times slower
# on two cores that another process used too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from lm.data import Corpus, DataError, load_corpus, training_batch, unigram_entropy
from lm.data import validation_windows as fixed_windows
from lm.figures import comparable_logs, draw_losses, read_log
from lm.model import LanguageModel, ModelConfig, sample
from tqdm import tqdm

BITS = 1 / math.log(2)
VALIDATION_COUNT = 32
PROMPT_BYTES, SAMPLE_BYTES, TEMPERATURE = 256, 200, 0.8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--attention", choices=["nsa", "full"], default="nsa", help="default: %(default)s")
    add(
        "--data",
        type=Path,
        help="a text file, or a folder of them; default: the stdlib's .py files",
    )
    add("--out", type=Path, default=Path("runs/lm"), help="default: %(default)s")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--steps", type=int, default=480, help="optimizer steps; default: %(default)s")
    add("--seq-len", type=int, default=512, help="bytes per window; default: %(default)s")
    add("--batch-size", type=int, default=4, help="windows per step; default: %(default)s")
    add("--lr", type=float, default=3e-3, help="peak learning rate; default: %(default)s")
    add("--seed", type=int, default=0, help="of weights, batches and sample; default: %(default)s")
    add(
        "--eval-every", type=int, default=40, help="steps between evaluations; default: %(default)s"
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the activations (weights stay float32); auto: bfloat16 on cuda, float32 on cpu",
    )
    sizes = parser.add_argument_group("sizes of the model (defaults are small, for a CPU)")
    for field in fields(ModelConfig):
        if field.type is int:
            flag = "--" + field.name.replace("_", "-")
            text = field.metadata["help"] + "; default: %(default)s"
            sizes.add_argument(flag, type=int, default=field.default, help=text)
    args = parser.parse_args()
    for name in ("steps", "seq_len", "batch_size", "eval_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    return args


class Trainer:
    """Model, optimizer, log and checkpoint of one run."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus):
        self.args, self.corpus = args, corpus
        self.device = torch.device(args.device)
        self.log_path = args.out / f"{args.attention}.jsonl"
        self.checkpoint_path = args.out / f"{args.attention}.pt"
        self.validation = fixed_windows(corpus.validation, VALIDATION_COUNT, args.seq_len)
        self.header = {
            "source": corpus.source,
            "text": corpus.digest,
            "unigram_bits": unigram_entropy(corpus.validation),
            "model": {f.name: getattr(args, f.name) for f in fields(ModelConfig)},
            **{k: getattr(args, k) for k in ("seq_len", "batch_size", "lr", "seed", "steps")},
            **{k: getattr(args, k) for k in ("device", "dtype")},
        }
        torch.manual_seed(args.seed)
        self.model = LanguageModel(ModelConfig(**self.header["model"])).to(self.device)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.95),
        )
        self.step, self.rows = 0, []

    def resume(self) -> None:
        """Goes on from the checkpoint: the curve is that of an uninterrupted run."""
        if not self.checkpoint_path.exists():
            raise SystemExit(f"--resume: there is no checkpoint {self.checkpoint_path}")
        state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        for key, ours in self.header["model"].items():
            if state["config"][key] != ours:
                raise SystemExit(
                    f"--resume: the checkpoint has {key} {state['config'][key]}, not {ours}"
                )
        if state["text"] != self.header["text"]:
            raise SystemExit("--resume: the checkpoint was trained on another text")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.rows = [row for row in read_log(self.log_path)[1] if row["step"] <= self.step]

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.args.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def learning_rate(self) -> float:
        """Linear warm-up over a tenth of the steps (at most 100), then a cosine down to a tenth."""
        warmup = max(1, min(100, self.args.steps // 10))
        if self.step < warmup:
            return self.args.lr * (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, self.args.steps - warmup)
        return self.args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def train_step(self) -> torch.Tensor:
        args = self.args
        seed = args.seed * 1_000_003 + self.step
        windows = training_batch(self.corpus.train, args.batch_size, args.seq_len, seed)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with self.autocast():
            loss = self.model.loss(windows.to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Bits per byte over the fixed windows."""
        total = 0.0
        for windows in self.validation.split(self.args.batch_size):
            with self.autocast():
                total += float(self.model.loss(windows.to(self.device))) * len(windows)
        return total / len(self.validation) * BITS

    def save(self) -> None:
        lines = [json.dumps(entry) for entry in (self.header, *self.rows)]
        self.log_path.write_text("\n".join(lines) + "\n")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.header["model"],
            "text": self.header["text"],
            "step": self.step,
        }
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint_path)

    def run(self) -> None:
        args = self.args
        with tqdm(total=args.steps, initial=self.step, unit="step", mininterval=0.5) as bar:
            while self.step < args.steps:
                started, losses = time.perf_counter(), []
                until = min(args.steps, (self.step // args.eval_every + 1) * args.eval_every)
                while self.step < until:
                    losses.append(self.train_step())
                    bar.update()
                train_bits = float(torch.stack(losses).mean()) * BITS  # waits for the device
                seconds = time.perf_counter() - started
                tokens_per_s = len(losses) * args.batch_size * args.seq_len / seconds
                row = {"step": self.step, "train_bits": train_bits, "val_bits": self.validate()}
                self.rows.append({**row, "tokens_per_s": round(tokens_per_s)})
                self.save()
                bar.set_postfix_str(
                    f"val {row['val_bits']:.2f} bits/byte, {tokens_per_s:,.0f} tok/s"
                )

    def sample(self) -> tuple[str, str]:
        """Whole lines from the middle of the held-out text, and how the model goes on."""
        held_out = self.corpus.validation
        middle = held_out[len(held_out) // 2 :][: min(PROMPT_BYTES, self.args.seq_len)]
        lines = bytes(middle.tolist()).split(b"\n")
        prompt = b"\n".join([*lines[1:-1], b""]) if len(lines) > 2 else bytes(middle.tolist())
        with self.autocast():
            text = sample(
                self.model, prompt, SAMPLE_BYTES, self.args.seq_len, TEMPERATURE, self.args.seed
            )
        return prompt.decode(errors="replace"), text.decode(errors="replace")


def main() -> None:
    args = parse_arguments()
    try:
        corpus = load_corpus(args.data, args.seq_len)
        trainer = Trainer(args, corpus)
    except (DataError, ValueError) as error:
        raise SystemExit(f"train_lm.py: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        trainer.resume()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    entropy = trainer.header["unigram_bits"]
    print(
        f"{corpus.source}: {len(corpus.train):,} bytes to train on, {len(corpus.validation):,} "
        f"held out, unigram entropy {entropy:.2f} bits/byte\n"
        f"{args.attention} attention, {parameters:,} parameters, {args.dtype} on {args.device}"
    )
    trainer.run()

    logs = comparable_logs(args.out, args.attention)
    figure = args.out / "loss.png"
    draw_losses(logs, figure)
    prompt, continuation = trainer.sample()
    print(f"\n--- held-out text\n{prompt}\n--- continued by the model\n{continuation}\n---\n")
    for kind, (_, rows) in logs.items():
        speed = sorted(row["tokens_per_s"] for row in rows)[len(rows) // 2]
        print(f"{kind}: {rows[-1]['val_bits']:.3f} validation bits/byte, {speed:,} tokens/s")
    print(f"unigram entropy: {entropy:.3f} bits/byte")
    print(f"wrote {figure}, {trainer.log_path}, {trainer.checkpoint_path}")


if __name__ == "__main__":
    main()
