"""What a command writes is there as a whole, or not at all."""

import pytest

from headrace.schemas.errors import ConfigError
from headrace.trainer.export.output import new_output


@pytest.mark.parametrize("make", [lambda p: p.write_text("a"), lambda p: p.mkdir()])
def test_it_has_its_name_when_it_is_finished_and_nothing_is_left_otherwise(tmp_path, make):
    output = tmp_path / "below" / "output"
    with pytest.raises(RuntimeError, match="half way"), new_output(output) as temporary:
        make(temporary)
        raise RuntimeError("half way")
    assert list(output.parent.iterdir()) == []
    with new_output(output) as temporary:
        make(temporary)
        assert not output.exists()
    assert list(output.parent.iterdir()) == [output]
    with pytest.raises(ConfigError, match="exists already; remove it"), new_output(output):
        pytest.fail("it was there")


def test_what_a_killed_command_left_is_cleared_away(tmp_path):
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "half").touch()
    with new_output(tmp_path / "model") as temporary:
        temporary.mkdir()
    assert list((tmp_path / "model").iterdir()) == []
