"""The calls that every attention test runs: odd sizes, one property at a time."""

import pytest
from helpers import Problem, make_inputs

from nsa_ext import NSAConfig

LENGTHS = [
    Problem(f"len{n}", seqlens=((n, n),), batch=2 if n < 1000 else 1, dim_v=64)
    for n in (1, 31, 32, 63, 64, 65, 113, 1023, 1024)
]
CROSS_LENGTHS = [
    Problem(f"{sq}x{sk}", seqlens=((sq, sk),), batch=2)
    for sq, sk in [
        (1, 31), (1, 64), (1, 700), (5, 1024), (65, 300), (63, 64), (64, 63), (200, 31), (7, 0),
    ]
] + [Problem("0x65", seqlens=((0, 65),)), Problem("no-batch", batch=0)]  # fmt: skip
GROUPS = [
    Problem(f"group{g}", seqlens=((40, 300),), heads_q=g * hkv, heads_kv=hkv)
    for g, hkv in [(1, 3), (2, 2), (4, 1), (6, 2), (8, 1), (12, 1), (16, 2), (32, 1)]
]
DIMS = [
    Problem(f"dims{dk}-{dv}", seqlens=((70, 330),), dim_qk=dk, dim_v=dv)
    for dk, dv in [(64, 64), (128, 128), (192, 128)]
]
PACKED = [
    Problem(
        "packed",
        seqlens=((0, 0), (65, 65), (0, 7), (31, 31), (1, 300), (130, 400), (0, 0)),
        packed=True,
    ),
    Problem("packed-sq-gt-sk", seqlens=((40, 9), (3, 0), (64, 64), (70, 69)), packed=True),
    Problem("packed-empty", seqlens=((0, 0), (0, 0)), packed=True),
    Problem("packed-one", seqlens=((129, 129),), packed=True, heads_q=8, heads_kv=1),
    Problem("packed-dims", seqlens=((33, 33), (50, 200)), packed=True, dim_qk=192, dim_v=128),
]
STRIDED = [
    Problem("strided", seqlens=((70, 290),), batch=2, strided=True),
    Problem("strided-packed", seqlens=((70, 70), (0, 3), (9, 290)), packed=True, strided=True),
]
CONFIGS = [
    Problem("default-config", seqlens=((32, 1400),), heads_kv=1, config=NSAConfig()),
    Problem("l64-d16", seqlens=((60, 420),), config=NSAConfig(64, 16, 64, 3, 1, 1, 64)),
    Problem("l16-d16", seqlens=((60, 420),), config=NSAConfig(16, 16, 64, 3, 1, 1, 65)),
    Problem("l32-d32", seqlens=((60, 420),), config=NSAConfig(32, 32, 64, 5, 0, 2, 63)),
    Problem("l16-d16-s32", seqlens=((60, 420),), config=NSAConfig(16, 16, 32, 6, 2, 2, 1)),
    Problem("s128", seqlens=((60, 720),), config=NSAConfig(32, 16, 128, 3, 1, 1, 10_000)),
    Problem("n1", seqlens=((60, 420),), config=NSAConfig(num_selected=1, num_init=0, num_local=1)),
    Problem(
        "free", seqlens=((60, 720),), config=NSAConfig(num_selected=5, num_init=0, num_local=0)
    ),
    Problem("n32", seqlens=((24, 1100),), config=NSAConfig(num_selected=32)),
    Problem("scale", softmax_scale=0.3),
]
# What only the CPU backend takes: any lengths, any dims.
ANY = [
    Problem(
        "l16-d8-s32", seqlens=((60, 420),), config=NSAConfig(16, 8, 32, 6, 2, 2, 1), cpu_only=True
    ),
    Problem("l4-d2-s4", seqlens=((30, 41),), config=NSAConfig(4, 2, 4, 3, 1, 1, 5), cpu_only=True),
    Problem("l3-d1-s5", seqlens=((30, 41),), config=NSAConfig(3, 1, 5, 3, 0, 2, 7), cpu_only=True),
    Problem("l1-d1-s1", seqlens=((9, 20),), config=NSAConfig(1, 1, 1, 4, 1, 2, 3), cpu_only=True),
    Problem("dims1-1", heads_q=6, dim_qk=1, dim_v=1, cpu_only=True),
    Problem("dims17-5", heads_q=3, heads_kv=1, dim_qk=17, dim_v=5, cpu_only=True),
    Problem("dims256-72", heads_q=5, heads_kv=5, dim_qk=256, dim_v=72, cpu_only=True),
]
PROBLEMS = [*LENGTHS, *CROSS_LENGTHS, *GROUPS, *DIMS, *PACKED, *STRIDED, *CONFIGS, *ANY]

# A long sequence as a whole, for one dtype per device, and a chunk at the end of one.
LONG = [
    Problem("long", seqlens=((4097, 4097),), heads_q=2, heads_kv=1, config=NSAConfig()),
    Problem("long-chunk", seqlens=((65, 4097),), heads_q=8, heads_kv=2, config=NSAConfig()),
]

# More than 65,535 (the limit of a grid's y and z) rows, queries (most of them see nothing), and
# batch times heads, which is large: on CUDA only.
MANY_ROWS = [
    Problem("many-rows", seqlens=((64, 64),), batch=1_100, heads_q=1, heads_kv=1),
    Problem("many-queries", seqlens=((70_000, 64),), heads_q=1, heads_kv=1),
    Problem("many-heads", seqlens=((1, 33),), batch=4_200, heads_q=16, heads_kv=16, cuda_only=True),
]


def setup(problem, backend, seed=0):
    """The inputs of a call; skips the test where this backend refuses it."""
    if backend.device == "cuda" and problem.cpu_only:
        pytest.skip("a shape that only the CPU backend takes")
    if backend.device == "cpu" and problem.cuda_only:
        pytest.skip("a shape for the limits of a CUDA grid")
    return make_inputs(problem, backend, seed)


def parametrize(problems):
    return pytest.mark.parametrize("problem", problems, ids=str)
