import aot_report


def test_a_new_table_keeps_the_notes_below_the_old_one(tmp_path):
    path = tmp_path / "tpu_schedules.md"
    notes = "\n## Notes\n\n- v5e's dot is the faster one.\n"
    path.write_text(f"# Static schedules\n\n| chip |\n|---|\n{notes}")
    assert aot_report.kept_notes(path) == notes


def test_a_first_report_has_no_notes_to_keep(tmp_path):
    assert aot_report.kept_notes(tmp_path / "absent.md") == ""
    assert aot_report.kept_notes(None) == ""
