from hypothesis import given
from hypothesis import strategies as st

from streamlstm.config.yaml12 import flow, parse


def value(text):
    document = parse(text)
    assert not document.flaws
    return document.value


def flaw(text):
    (only,) = parse(text).flaws
    return only


def test_only_true_and_false_are_booleans():
    assert value("[true, True, FALSE, yes, NO, on, off, y, N]") == [
        True,
        True,
        False,
        *("yes", "NO", "on", "off", "y", "N"),
    ]


def test_numbers_in_scientific_notation_are_numbers():
    assert value("[1e-3, 1E5, -2.5e+3, .5, 3., 17, -4]") == [1e-3, 1e5, -2500.0, 0.5, 3.0, 17, -4]


def test_times_dates_octals_hex_and_underscores_stay_text():
    texts = ["12:30", "2026-01-01", "2026-01-01T00:00:00Z", "010", "0o17", "0x1F", "1_000", "1.2.3", ".inf", ".nan"]
    assert value(f"[{', '.join(texts)}]") == texts


def test_a_number_of_ten_thousand_digits_stays_text():
    assert value(f"a: {'9' * 10_000}") == {"a": "9" * 10_000}
    assert value("a: 1e999") == {"a": "1e999"}


def test_nothing_tilde_and_null_are_null():
    assert value("{a: , b: ~, c: null}") == {"a": None, "b": None, "c": None}


def test_every_key_and_entry_knows_its_line():
    lines = parse("a:\n  b: 1\n  c:\n    - x\n    - y\n").lines
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5}


def test_a_key_that_stands_twice_is_told_with_both_lines():
    found = flaw("a:\n  b: 1\n  b: 2\n")
    assert (found.line, found.path) == (3, ("a", "b"))
    assert "line 2" in found.fix


def test_an_alias_is_refused_before_it_can_grow():
    bomb = "a: &a [x]\n" + "".join(f"{n}: &{n} [*{m}, *{m}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True))
    assert "aliases" in flaw(bomb).fix
    assert "aliases" in flaw("a: &a [*a]").fix


def test_a_merge_key_is_only_a_key():
    assert value("<<: {a: 1}") == {"<<": {"a": 1}}


def test_tags_make_no_objects():
    for tagged in ("!!python/object/apply:os.system [x]", "!!python/name:os.system x", "!!int x", "!!set {x}"):
        assert "tags are not read" in flaw(f"a: {tagged}").fix


def test_a_quoted_number_stays_text():
    assert value("""['12', "1e3"]""") == ["12", "1e3"]


def test_unquoted_at_sign_is_told_to_be_quoted():
    found = flaw("a: 1\nseries_id: [@field]\n")
    assert found.line == 2
    assert "in quotes" in found.fix


def test_a_tab_is_told_to_be_a_space():
    assert "spaces" in flaw("a:\n\tb: 1\n").fix


def test_two_documents_are_one_too_many():
    assert "one document" in flaw("a: 1\n---\nb: 2\n").fix


def test_a_control_character_is_told_with_its_line():
    found = flaw("a: 1\nb: x\x07\n")
    assert found.line == 2
    assert "U+0007" in found.fix


def test_deep_nesting_is_no_crash():
    assert "deeply" in flaw("[" * 20_000).fix


@given(st.text())
def test_no_text_raises(text):
    parse(text)


leaf = st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False)
printable = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=["Cc", "Cs"]))


@given(leaf | printable | st.lists(leaf | printable) | st.dictionaries(printable, leaf | printable))
def test_what_is_written_is_read_back(thing):
    back = value(f"k: {flow(thing)}")["k"]
    assert back == thing
    assert type(back) is type(thing)
