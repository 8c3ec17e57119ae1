"""What a resumed run may change, and the page that says so."""

from pathlib import Path

from headrace.trainer.checkpoint.resume_record import FREE_ON_RESUME, LOADER_SETTINGS_KEPT, PLACES

PAGE = Path(__file__).parents[3] / "docs/resume.md"


def test_the_page_names_every_setting_that_may_change():
    table = PAGE.read_text().split("| free to change |")[1].split("\n\n")[0]
    written = table.replace("[[", "").replace("[", "").replace("]", "")
    missing = [key for key in sorted({*FREE_ON_RESUME, *PLACES}) if f"`{key}`" not in written]
    assert missing == []
    assert "`loader` but for `shuffle`, `shuffle_window` and packing" in written
    assert {"shuffle", "shuffle_window", "pack"} <= LOADER_SETTINGS_KEPT
