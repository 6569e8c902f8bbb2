import os

import torch

from streamlstm.recovery.fingerprint import compare_fingerprints, doubt_rows, parse_cpuinfo, take_fingerprint


def test_a_process_agrees_with_itself():
    assert compare_fingerprints(take_fingerprint("cpu", 1), take_fingerprint("cpu", 1)) == []


def test_the_number_of_threads_matters():
    told = compare_fingerprints(take_fingerprint("cpu", 1), take_fingerprint("cpu", 2))

    assert told == ["threads was 1 and is 2"]


def test_switches_that_choose_other_kernels_matter(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    before = take_fingerprint("cpu", 1)
    monkeypatch.setitem(os.environ, "ONEDNN_MAX_CPU_ISA", "AVX2")

    told = compare_fingerprints(before, take_fingerprint("cpu", 1))

    assert told == ["switches was not set and is ONEDNN_MAX_CPU_ISA=AVX2"]


def test_it_is_plain_text_that_can_be_published():
    assert {type(value) for value in take_fingerprint("cpu", 1).values()} == {str}


def test_versions_are_in_it():
    assert take_fingerprint("cpu", 1)["torch"] == torch.__version__


def test_an_unreadable_cpuinfo_is_no_error():
    assert parse_cpuinfo("") == ("", "")


def test_the_fingerprint_holds_what_a_golden_step_comes_to():
    assert len(take_fingerprint("cpu", 1)["golden"]) == 16
    assert compare_fingerprints({"golden": "a"}, {"golden": "b"}) == ["golden was a and is b"]


def test_where_the_self_test_failed_nothing_matches_not_even_itself():
    doubtful = {"cpu": "any"} | doubt_rows(["cell state", "head"])

    (told, again) = compare_fingerprints(doubtful, doubtful)
    assert told == "then a row of the cell state and the head depended on the rows beside it"
    assert again.startswith("now ")
    assert len(compare_fingerprints({"cpu": "any"}, doubtful)) == 1
    assert {"cpu": "any"} | doubt_rows([]) == {"cpu": "any"}
