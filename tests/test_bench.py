"""The benchmark scripts: statistics, result files, comparison, figures. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa_ext

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)


def row(median, spread=0.1, **fields):
    """A result row whose quartiles lie `spread` around the median."""
    return {
        "what": "operator",
        "impl": "nsa",
        "pass": "forward",
        "seqlen": 1024,
        "median_ms": median,
        "q1_ms": median - spread,
        "q3_ms": median + spread,
        "min_ms": median - 2 * spread,
        "max_ms": median + 2 * spread,
        "repeats": 9,
        **fields,
    }


# Statistics and files.


def test_timing():
    from common import Timing

    timing = Timing.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert timing == Timing(3.0, 2.0, 4.0, 1.0, 5.0, 5)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 2.0, 2.0, 1)
    difference = Timing(10.0, 9.0, 11.0, 8.0, 12.0, 7).minus(Timing(4.0, 3.5, 4.5, 3.0, 5.0, 5))
    assert difference == Timing(6.0, 4.5, 7.5, 3.0, 9.0, 5)
    assert timing.fields()["q3_ms"] == 4.0


def test_measure_stops_by_count_and_by_time():
    from common import measure

    calls = []
    assert measure(lambda: calls.append(0), warmup=2, repeats=5).repeats == 5
    assert len(calls) == 7
    before = []
    timing = measure(
        lambda: None, warmup=0, repeats=5, max_seconds=0, before=lambda: before.append(0)
    )
    assert timing.repeats == len(before) == 1


def test_every_row_carries_where_it_comes_from(tmp_path):
    from common import PROVENANCE, environment, read_results, write_results

    where = environment()
    write_results(tmp_path / "a" / "x.json", [row(1.0), row(2.0, seqlen=2048)], where)
    read_where, rows = read_results(tmp_path / "a" / "x.json")
    assert read_where == where
    assert [r["seqlen"] for r in rows] == [1024, 2048]
    assert set(PROVENANCE) == {"machine", "gpu", "driver", "torch", "commit", "command"}
    for name in PROVENANCE:
        assert all(r[name] == where.get(name) for r in rows)
    assert rows[0]["machine"] and rows[0]["torch"] == torch.__version__


def test_command_names_no_folder_of_the_machine(monkeypatch, tmp_path):
    from common import environment

    arguments = [str(BENCH / "run.py"), "window", "--output", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--checkpoint", str(ROOT / "runs" / "a.pt")])
    command = "python bench/run.py window --output x.json --checkpoint runs/a.pt"
    assert environment()["command"] == command


def test_commit_can_be_named(monkeypatch):
    from common import environment

    monkeypatch.setenv("NSA_EXT_COMMIT", "abc1234")
    assert environment()["commit"] == "abc1234"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": 3}'])
def test_what_is_no_result_file(tmp_path, text):
    from common import read_results

    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: not a result file"):
        read_results(path)
    with pytest.raises(ValueError, match="not a result file"):
        read_results(tmp_path / "missing.json")


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*.json")), ids=lambda p: p.name)
def test_published_results(path):
    """What README and figures stand on: no row twice, and each says where it comes from."""
    from common import PROVENANCE, key_of, read_results

    _, rows = read_results(path)
    keys = [key_of(r) for r in rows]
    assert rows and len(set(keys)) == len(keys)
    assert all(name in r for r in rows for name in PROVENANCE)
    assert all("error" not in r for r in rows)


# Comparison.


@pytest.mark.parametrize(
    ("old", "new", "verdicts"),
    [
        (row(10.0), row(10.0), []),
        (row(10.0), row(12.0), ["slower"]),
        (row(12.0), row(10.0), ["faster"]),
        (row(10.0, 1.5), row(12.0, 1.5), []),  # the quartiles overlap
        (row(10.0), row(10.25), []),  # they do not, but 2.5 % are within the margin
        (row(10.0, peak_extra_gb=1.0), row(10.0, peak_extra_gb=1.1), ["more memory"]),
        (row(10.0, extra_bytes=100), row(12.0, extra_bytes=90), ["slower", "less memory"]),
        (row(10.0, peak_extra_gb=1.0), row(10.0), []),
        ({**row(1.0), "median_ms": None}, row(9.0), []),
    ],
)
def test_verdicts(old, new, verdicts):
    from compare import compare_rows

    assert [change.verdict for change in compare_rows(old, new, margin=0.03)] == verdicts


def test_extremes_count_where_there_are_no_quartiles():
    from compare import compare_rows

    def without(r):
        return {name: value for name, value in r.items() if name not in ("q1_ms", "q3_ms")}

    # Quartiles 10.4 and 10.6 would not overlap; the extremes 10.8 and 10.2 do.
    old, new = row(10.0, 0.4), row(11.0, 0.4)
    assert [c.verdict for c in compare_rows(old, new, 0.03)] == ["slower"]
    assert compare_rows(without(old), without(new), 0.03) == []


def test_rows_belong_together_by_what_they_measured():
    from common import key_of

    base = row(1.0, inputs="random")
    assert key_of(base) == key_of(row(2.0, inputs="random", commit="b", neighbours_share=0.5))
    assert key_of(base) == key_of({**base, "l2": "", "batch": None})
    for other in ({"seqlen": 2048}, {"pass": "backward"}, {"impl": "cudnn"}, {"l2": "cold"}):
        assert key_of(base) != key_of({**base, **other})


def compare_files(tmp_path, monkeypatch, old, new, *options):
    from common import write_results
    from compare import main

    where = {"commit": "old", "gpu": "A", "machine": "m", "torch": "1", "driver": "1"}
    write_results(tmp_path / "old.json", old, where)
    write_results(tmp_path / "new.json", new, {**where, "commit": "new", "gpu": "B"})
    arguments = [str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    return main()


def test_compare_command(tmp_path, monkeypatch, capsys):
    old = [row(10.0), row(20.0, seqlen=2048), row(5.0, seqlen=4096)]
    new = [row(11.0), row(15.0, seqlen=2048), row(1.0, seqlen=8192)]
    assert compare_files(tmp_path, monkeypatch, old, new) == 1
    shown = capsys.readouterr().out
    assert "old -> new: 2 rows in both files" in shown
    assert "NOT THE SAME gpu: A -> B" in shown
    assert "1 rows only in the old file" in shown and "seqlen=4096" in shown
    assert "1 rows only in the new file" in shown and "seqlen=8192" in shown
    assert shown.index("slower") < shown.index("faster")
    assert "1 rows got worse, 1 better" in shown

    assert compare_files(tmp_path, monkeypatch, old, new, "--margin", "0.2") == 0
    assert compare_files(tmp_path, monkeypatch, old, old) == 0
    assert compare_files(tmp_path, monkeypatch, old, [row(1.0, seqlen=7)]) == 2


def test_compare_of_a_file_that_is_none(tmp_path, monkeypatch, capsys):
    from compare import main

    (tmp_path / "x.json").write_text("no")
    monkeypatch.setattr(sys, "argv", ["compare.py", *[str(tmp_path / "x.json")] * 2])
    assert main() == 2
    assert "not a result file" in capsys.readouterr().err


# How much neighbours share.


@pytest.mark.parametrize("distance", [1, 3, 16, 70])
def test_shared_fraction(distance):
    from inputs import shared_fraction

    config = nsa_ext.NSAConfig(num_selected=6)
    blocks = torch.full((2, 1200, 2, 6), -1, dtype=torch.int32)
    for b, t, head in ((b, t, h) for b in range(2) for t in range(1200) for h in range(2)):
        own = t // config.select_size
        forced = {0, own, max(0, own - 1)}
        others = [j for j in torch.randperm(own + 1).tolist() if j not in forced]
        chosen = sorted(forced | set(others[: 6 - len(forced)]))
        blocks[b, t, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)

    shared = total = 0
    for b, t, head in ((b, t, h) for b in range(2) for t in range(900, 1200) for h in range(2)):
        if t - distance < 900:
            continue
        before = (t - distance) // config.select_size
        earlier = set(blocks[b, t - distance, head].tolist())
        for j in blocks[b, t, head].tolist():
            if 1 <= j <= before - config.num_local:
                total += 1
                shared += j in earlier
    assert total > 1000
    assert shared_fraction(blocks, config, distance) == shared / total


def test_distinct_blocks():
    from inputs import distinct_blocks

    blocks = torch.stack([torch.randperm(20)[:6] for _ in range(2 * 64 * 3)]).int()
    blocks = blocks.view(2, 64, 3, 6).sort(-1).values
    blocks[:, :, :, -1] = -1  # padding is no block
    blocks[:, 60:, 1] = 7  # nor is a repeated one two
    last = blocks[:, 48:]
    for tokens in (1, 4, 5, 16):
        tiles = 16 // tokens
        sizes = [
            len(set(last[b, i * tokens : (i + 1) * tokens, h].flatten().tolist()) - {-1})
            for b in range(2)
            for i in range(tiles)
            for h in range(3)
        ]
        assert distinct_blocks(blocks, tokens) == pytest.approx(sum(sizes) / len(sizes))


def test_coherent_queries_are_a_slow_walk():
    from inputs import COHERENT_RHO, make_inputs

    kwargs = {"device": "cpu", "dtype": torch.float32}
    q = make_inputs("coherent", 1, 3000, 8, 2, 16, 16, **kwargs).q
    assert q.std() == pytest.approx(1.0, abs=0.05)
    for lag in (1, 10, 300):  # the last one beyond a chunk
        correlation = (q[:, lag:] * q[:, :-lag]).mean() / (q * q).mean()
        assert correlation == pytest.approx(COHERENT_RHO**lag, abs=0.05)
    independent = make_inputs("random", 1, 3000, 8, 2, 16, 16, **kwargs).q
    assert abs((independent[:, 1:] * independent[:, :-1]).mean()) < 0.01


def test_recorded_inputs_give_the_recorded_selection(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from attentions import implementation, selection_of
    from lm.model import LanguageModel, ModelConfig
    from real import record

    sizes = {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 16}
    blocks = {"select_size": 64, "num_selected": 16, "window": 512}
    model = LanguageModel(ModelConfig(**sizes, **blocks))
    model.trained_steps = 0
    seen = []
    attention = model.layers[1].attention
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs, chosen = record(model, 1300, "cpu", keep=1)
    hook.remove()
    assert len(chosen) == 2 and chosen[0].shape == (1, 1300, 2, 16)
    assert inputs.q.shape == (1, 1300, 4, 16)
    assert inputs.notes["text_bytes"] == 1300
    assert torch.equal(selection_of(inputs), chosen[1])
    with torch.no_grad():
        out = implementation("nsa", inputs)(*inputs.tensors)
    assert torch.equal(out.flatten(2), seen[0])


def test_decode_steps():
    from decode import ROOM, bytes_read, nsa_operator

    attend, store_and_attend, cache = nsa_operator(2, 1500, 4, 2, (16, 8), device="cpu")
    assert cache.sync() == [1500, 1500] and cache.capacity >= 1500 + ROOM
    assert attend().shape == (2, 1, 4, 8)
    assert torch.equal(attend(), attend())
    store_and_attend()
    assert cache.sync() == [1501, 1501]
    # 92 compressed tokens, 16 blocks of 64, a window of 512.
    assert bytes_read(2, 1500, 2, (16, 8), sparse=True) == 2 * (92 + 1024 + 512) * 2 * 24 * 2
    assert bytes_read(2, 1500, 2, (16, 8), sparse=False) == 2 * 1500 * 2 * 24 * 2


# Figures.


def figure_rows():
    """Made-up rows for every figure."""
    place = {"machine": "m", "gpu": "Some GPU"}
    rows = []
    for seqlen in (1024, 4096, 16384):
        for impl, factor in (("nsa", 1.0), ("cudnn", seqlen / 4096), ("flash2", seqlen / 2048)):
            for inputs in ("random", "coherent") if impl == "nsa" else ("random",):
                for name in ("forward", "forward+backward", "backward"):
                    fields = {"impl": impl, "inputs": inputs, "pass": name, "seqlen": seqlen}
                    memory = {} if name == "backward" else {"peak_extra_gb": seqlen / 1e4}
                    rows.append(row(factor * seqlen / 1e3, **fields, **memory, **place))
            decode = {"what": "decode", "impl": impl, "pass": "decode", "l2": "cold"}
            for batch in (1, 8):
                rows.append(row(factor, **decode, seqlen=seqlen, batch=batch, **place))
        shape = {"inputs": "random", "l2": "warm", "batch": 1, "head_dim": 128, "head_dim_v": 128}
        for name in ("compress", "compressed", "selected", "window"):
            for kernel in (name, f"{name}_bwd", f"{name}_select"):
                cost = {"gflop": 50.0, "gbytes": 0.5, "tflops": 90.0, "tbps": 0.9}
                cost |= {"gather_gbytes": 3.0} if "selected" in kernel else {}
                made = row(seqlen / 1e3, kernel=kernel, seqlen=seqlen, **shape, **cost, **place)
                rows.append({k: v for k, v in made.items() if k not in ("what", "impl", "pass")})
    for kind, rate in (
        ("copy", {"tbps": 3.0}),
        ("gather", {"tbps": 8.0}),
        ("matmul", {"tflops": 7e2}),
    ):
        rows.append({"kernel": f"ceiling_{kind}", "median_ms": 1.0, **rate, **place})
    for impl in ("nsa", "dense"):
        for name in ("forward", "forward+backward"):
            for seqlen in (256, 512):
                fields = {"impl": impl, "pass": name, "seqlen": seqlen, "extra_bytes": seqlen << 10}
                rows.append(row(float(seqlen), **fields, machine="m", gpu=None))
    return rows


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib.image
    from common import write_results
    from plot import FIGURES, draw

    rows = figure_rows()
    where = {"machine": "m"}
    results = tmp_path / "results"
    write_results(results / "all.json", [], where)
    (results / "all.json").write_text(json.dumps({"environment": where, "rows": rows}))
    written = draw(results, tmp_path / "figures", list(FIGURES))
    assert [path.stem for path in written] == list(FIGURES)
    for path in written:
        picture = matplotlib.image.imread(path)[..., :3]
        height, width = picture.shape[:2]
        assert 1300 <= width <= 1400 and 400 <= height <= 800
        assert picture.mean() > 0.85  # light
        assert 0.01 < (picture.min(-1) < 0.5).mean() + (picture.std(-1) > 0.1).mean()  # not empty
        assert path.stat().st_size < 200_000


def test_figures_without_rows_are_left_out(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from common import write_results
    from plot import FIGURES, draw

    write_results(tmp_path / "x.json", [row(1.0)], {"machine": "m"})
    assert draw(tmp_path, tmp_path, list(FIGURES)) == []
    shown = capsys.readouterr().out
    assert all(f"{name}.png: no rows" in shown for name in FIGURES)


# The scripts as commands.


def script(*command, **kwargs):
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, **kwargs
    )


def test_cpu_sweep_at_tiny_sizes(tmp_path):
    from common import read_results

    out = tmp_path / "cpu.json"
    done = script(BENCH / "run_cpu.py", "--lengths", 64, 128, "--repeats", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    where, rows = read_results(out)
    assert where["command"].startswith("python bench/run_cpu.py --lengths 64 128")
    measured = {(r["impl"], r["seqlen"], r["pass"]) for r in rows}
    assert measured == {
        (impl, seqlen, name)
        for impl in ("nsa", "dense")
        for seqlen in (64, 128)
        for name in ("forward", "forward+backward")
    }
    assert all(r["median_ms"] > 0 for r in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_gpu_sweep_says_that_there_is_no_gpu():
    done = script(BENCH / "run.py", "operator")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    done = script(BENCH / "run.py", "operators")
    assert done.returncode == 2 and "expected of operator" in done.stderr


def test_all_gpu_runs_the_steps_that_it_is_told(tmp_path):
    def run(steps, **variables):
        command = ["bash", str(BENCH / "all_gpu.sh"), str(tmp_path)]
        environment = {**os.environ, "STEPS": steps, "PYTHON": "false", **variables}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = run("nothing")
    assert done.returncode == 0 and done.stdout == ""
    done = run("decode")
    assert done.returncode == 1
    assert "bench/run.py" in done.stdout and "decode: FAILED" in done.stdout
    done = run("decode layer", LIMIT="1")
    assert done.returncode == 1 and done.stdout.count("LEFT OUT") == 2
    assert run("decode", PROFILE="fast").returncode == 2


def test_micro_says_how_to_build_its_module(tmp_path):
    done = script(BENCH / "micro.py", "--module", tmp_path)
    assert done.returncode == 1 and "--help` says how to build it" in done.stderr


FAKE_MODULE = """
class UsageError(ValueError): pass
def usage(): return "usage: fake"
def run(arguments, progress):
    if arguments == ["--odd"]: raise UsageError("unknown option --odd")
    window = {"kernel": "window", "part": "", "seqlen": 64, "median_ms": 1 / 3}
    rows = [{**window, "arguments": arguments}, {"kernel": "select", "error": "not supported"}]
    for row in rows: progress(row)
    return {"environment": {"gpu": "G", "multiprocessors": 7, "command": "nsa_bench"}, "rows": rows}
"""


def test_micro_drives_the_module(tmp_path, monkeypatch, capsys):
    import common
    import micro

    (tmp_path / "nsa_bench.py").write_text(FAKE_MODULE)
    monkeypatch.delitem(sys.modules, "nsa_bench", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(micro, "environment", lambda device: common.environment())
    out = tmp_path / "out.json"
    options = ["--module", str(tmp_path), "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["micro.py", *options, "window", "--lengths", "64"])
    micro.main()
    where, rows = common.read_results(out)
    assert where["multiprocessors"] == 7 and where["command"] != "nsa_bench"
    assert rows[0]["median_ms"] == 0.333333 and rows[0]["commit"] == where["commit"]
    assert rows[0]["arguments"] == ["window", "--lengths", "64"]
    assert "not supported" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["micro.py", *options, "--odd"])
    with pytest.raises(SystemExit) as exit_:
        micro.main()
    assert exit_.value.code == 2
    assert "unknown option --odd" in capsys.readouterr().err


def test_micro_table():
    from micro import label, rounded, table_row

    assert label({"kernel": "window", "part": ""}) == "window"
    assert label({"kernel": "window", "part": "k 2"}) == "  window/k 2"
    assert label({"kernel": "ceiling_copy", "variant": "memcpy"}) == "  ceiling_copy/memcpy"
    shown = table_row({"kernel": "window", "seqlen": 64, "median_ms": 0.5, "backend": ""})
    assert shown[:2] == ["window", 64] and shown[4] is None and 0.5 in shown
    failed = table_row({"kernel": "window", "error": "no such kernel"})
    assert failed[:2] == ["window", "no such kernel"] and len(failed) == len(shown)
    assert rounded(0.123456789) == 0.123457 and rounded(7) == 7 and rounded("a") == "a"
