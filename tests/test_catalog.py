"""The catalogue: complete, and true by construction."""

from __future__ import annotations

import re

import pytest

from manyheads import catalog, spec


def test_all_systems_are_listed_once_and_in_order():
    found = catalog.entries()
    assert [e.number for e in found] == list(range(159))
    assert len({e.slug for e in found}) == 159
    assert all(re.fullmatch(r"manyheads(\.\w+)+", e.home) and e.title for e in found)


def test_every_system_has_checks_in_words():
    found = catalog.entries()
    assert sum(len(e.checks) for e in found) == 928
    assert all(check and len(check) < 120 for e in found for check in e.checks)


def test_every_test_named_as_evidence_exists():
    named = {s.slug: s.evidence for s in spec.registry().values()}
    named |= {t.slug: t.table for t in spec.evidence_tables().values()}
    unknown = [
        (slug, test) for slug, table in named.items() for ids in table.values() for test in ids
        if not catalog._existing((test,))
    ]  # fmt: skip
    assert not unknown


def test_evidence_belongs_to_a_check_of_a_listed_system():
    checks = {e.slug: len(e.checks) for e in catalog.entries()}
    for table in spec.evidence_tables().values():
        assert table.slug in checks
        assert max(table.table, default=0) <= checks[table.slug], table.slug
    for found in spec.registry().values():
        assert max(found.evidence, default=0) <= checks.get(found.slug, 0), found.slug


@pytest.fixture
def planted(monkeypatch):
    """Registers evidence for a system as if its module had."""
    monkeypatch.setattr(spec, "evidence_tables", lambda: dict(spec._EVIDENCE))
    monkeypatch.setattr(spec, "_EVIDENCE", {})
    return lambda table: spec.evidence("avo", table, object="manyheads.lab.avo")


def test_a_system_works_only_when_a_real_test_holds_each_check(planted):
    here = "test_catalog::test_all_systems_are_listed_once_and_in_order"
    planted(dict.fromkeys(range(1, 7), here))
    assert catalog.entry("avo").state == "works" and catalog.entry("avo").missing == ()
    assert catalog.entry("avo").object == "manyheads.lab.avo"

    planted(dict.fromkeys(range(1, 6), here))
    assert catalog.entry("avo").state == "planned" and catalog.entry("avo").missing == (6,)

    planted(dict.fromkeys(range(1, 6), here) | {6: "test_catalog::test_that_nobody_wrote"})
    assert catalog.entry("avo").state == "planned" and catalog.entry("avo").missing == (6,)


@pytest.mark.parametrize(
    ("test", "exists"),
    [
        ("tests/test_catalog.py::test_all_systems_are_listed_once_and_in_order", True),
        ("test_catalog::test_all_systems_are_listed_once_and_in_order", True),
        ("elsewhere/test_catalog.py::test_all_systems_are_listed_once_and_in_order", False),
        ("test_spec::test_all_systems_are_listed_once_and_in_order", False),
        ("test_catalog::planted", False),
    ],
)
def test_an_id_names_its_file_and_its_function(test, exists):
    assert bool(catalog._existing((test,))) is exists


def test_without_a_test_tree_the_record_is_believed(monkeypatch):
    monkeypatch.setattr(catalog, "_test_root", lambda: None)
    assert catalog._existing(("test_x::test_y",)) == ("test_x::test_y",)


def test_a_system_without_evidence_is_planned():
    found = catalog.entry("avo")
    assert found.state == "planned" and found.object is None and found.missing == (1, 2, 3, 4, 5, 6)


def test_an_unknown_system_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown system 'paking': did you mean 'packing'"):
        catalog.entry("paking")


def test_a_system_with_parts_unbuilt_does_not_work():
    found = catalog.entry("fa4")
    assert not found.missing and found.unbuilt and found.state == "planned"
