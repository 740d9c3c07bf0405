import pytest

from ssl_geo.files import written_whole


def test_a_file_is_new_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    with written_whole(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def killed() -> None:
        with written_whole(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
