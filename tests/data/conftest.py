"""Fixtures of the tests of data: a cache of their own for prepared data sets, and three pictures."""

from pathlib import Path

import datasets
import pytest
from shades import SHADES, picture


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of shade 10, 20, 30 in `images/`."""
    (tmp_path / "images").mkdir()
    for shade in SHADES:
        picture(shade).save(tmp_path / "images" / f"{shade}.png")
    return tmp_path
