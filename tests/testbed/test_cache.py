import pytest

from benchmarks.testbed.cache import building, cache_folder


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ESMERGE_CACHE", raising=False)
    assert cache_folder() == tmp_path / "esmerge" / "testbed"
    monkeypatch.setenv("ESMERGE_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    folder = tmp_path / "cache" / "model"
    with building(folder) as temporary:
        (temporary / "weights").write_text("all of them")
        assert not folder.exists()
    assert (folder / "weights").read_text() == "all of them"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("half of th")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_who_finishes_first_wins(tmp_path):
    folder = tmp_path / "model"
    with building(folder) as slow:
        (slow / "weights").write_text("slow")
        with building(folder) as fast:
            (fast / "weights").write_text("fast")
    assert (folder / "weights").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [folder]
