"""Files and directories that appear whole or not at all."""

import pytest

from sherry_gguf.training.files import umask, whole_directory


def test_appearing(tmp_path, monkeypatch):
    """A new directory, and empty ones that cannot be replaced: the current one, one that is linked to."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target, real in ("new/er", "new/er"), ("../link", "there"), (".", "here"):
        target = tmp_path / target if target != "." and target[0] != "." else target
        node = (tmp_path / real).stat().st_ino if (tmp_path / real).exists() else None
        with pytest.raises(KeyError), whole_directory(target) as part:
            (part / "config.json").write_text("half")
            raise KeyError
        assert not (tmp_path / real).exists() or not any((tmp_path / real).iterdir())
        with whole_directory(target) as part:
            (part / "config.json").write_text("whole")
            (part / "a").write_text("")
        assert sorted(p.name for p in (tmp_path / real).iterdir()) == ["a", "config.json"]
        assert node in (None, (tmp_path / real).stat().st_ino)
        assert (tmp_path / real).stat().st_mode & 0o777 == 0o777 & ~umask()
    assert not any(p.name.endswith(".part") for p in tmp_path.rglob("*"))
    with pytest.raises(OSError):
        with whole_directory(tmp_path / "here/a/b"):  # below a file
            pass
