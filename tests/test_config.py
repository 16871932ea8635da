"""NSAConfig validates itself and counts blocks."""

import dataclasses
import pickle

import pytest

from nsa_ext import NSAConfig

NAMES = [field.name for field in dataclasses.fields(NSAConfig)]


def test_defaults_are_those_of_the_paper():
    config = NSAConfig()
    assert config.as_list() == [32, 16, 64, 16, 1, 2, 512]
    assert NAMES == [
        "block_size", "block_stride", "select_size", "num_selected", "num_init", "num_local",
        "window",
    ]  # fmt: skip


def test_frozen_hashable_and_equal_by_value():
    config = NSAConfig(window=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 8
    assert config == NSAConfig(window=7) != NSAConfig()
    assert len({config, NSAConfig(window=7), NSAConfig()}) == 2
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, window=512) == NSAConfig()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1.0, "16", None, True])
def test_wrong_type(name, value):
    with pytest.raises(TypeError, match=name):
        NSAConfig(**{name: value})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1, 2**31, 0])
def test_out_of_range(name, value):
    if value == 0 and name in ("num_init", "num_local"):
        assert getattr(NSAConfig(**{name: 0}), name) == 0
        return
    with pytest.raises(ValueError, match=name):
        NSAConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"block_stride": 12}, "block_size"),
        ({"block_size": 48, "block_stride": 24}, "select_size"),
        ({"block_size": 128}, "block_size"),
        ({"select_size": 16}, "block_size"),
        ({"num_selected": 2}, "num_selected"),
        ({"num_init": 10, "num_local": 7}, "num_selected"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_together(fields, name):
    with pytest.raises(ValueError, match=rf"{name}.*expected.*got"):
        NSAConfig(**fields)


@pytest.mark.parametrize(
    ("seqlen", "compressed", "blocks"),
    [(0, 0, 0), (1, 0, 1), (31, 0, 1), (32, 1, 1), (47, 1, 1), (48, 2, 1), (64, 3, 1), (65, 3, 2),
     (1024, 63, 16)],
)  # fmt: skip
def test_counts(seqlen, compressed, blocks):
    assert NSAConfig().num_compressed(seqlen) == compressed
    assert NSAConfig().num_select_blocks(seqlen) == blocks
