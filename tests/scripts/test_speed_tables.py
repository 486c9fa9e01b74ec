"""The tables of docs/speed.md are those of the files that they name."""

import json

import pytest

from scripts import speed_tables


def test_the_page_is_what_the_script_writes():
    page = speed_tables.PAGE.read_text(encoding="utf-8")
    assert speed_tables.renewed(page) == page
    assert page.count("<!-- end -->") == len(speed_tables._TABLE.findall(page)) > 0


def test_peers_and_products_become_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_tables, "FILES", tmp_path)
    environment = {"device": "a GPU", "versions": {"torch": "2.11"}}
    record = {"date": "2026-11-28T00:00:00", "environment": environment}
    found = {"queued_ms": 133.66, "first_call_s": 18.0, "peak_bytes": 2**31}
    (tmp_path / "p.json").write_text(json.dumps(record | {"results": {"compile": found}}))
    assert "| compile | 133.7 | 18.0 | 2.0 |" in speed_tables.table("peers", "p.json", None)
    found = {"ms": {"bf16": 0.327}, "tops": {"bf16": 798.4}}
    (tmp_path / "h.json").write_text(json.dumps(record | {"results": {"qkv": found}}))
    assert "| bf16 | 327, 798 |" in speed_tables.table("products", "h.json", None)


def test_an_unknown_kind_of_table_is_named():
    with pytest.raises(ValueError, match="'steps'; it must be one of step"):
        speed_tables.table("steps", "h100_step.json", None)
