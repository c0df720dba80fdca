import pytest

from jaxllm.curate import lines

PAGE = "Skip to content\n\nThe ferry left early.\n  It was foggy.\nWe use cookies. Click here.\n\nNobody was there.\n"


@pytest.mark.parametrize(
    "text, share",
    [
        ("The ferry left early.", 0),
        ("She baked cookies and signed the privacy wall.", 0),
        ("All RIGHTS reserved.", 1),
        ("Old tales. Click here!", 0.5),
        ("Read more | Old tales", 0.57),
        ("", 0),
    ],
)
def test_the_share_is_of_sentences_with_a_phrase(text, share):
    assert lines.boilerplate(text) == pytest.approx(share, abs=0.01)


def test_lines_of_boilerplate_are_removed_and_the_others_stay_as_they_were():
    cut = lines.without_boilerplate(PAGE, 0.5)
    assert cut.removed == ["Skip to content", "We use cookies. Click here."]
    assert cut.text == "\nThe ferry left early.\n  It was foggy.\n\nNobody was there.\n"


def test_indentation_and_ends_of_lines_stay_where_a_line_is_removed():
    for end in ("\r\n", "\x0c", "\u2028", "\n"):
        text = f"    The ferry left.{end}We use cookies.{end}\tNobody was there. {end}"
        assert lines.without_boilerplate(text, 0.5).text == text.replace(f"We use cookies.{end}", "")


def test_a_paragraph_that_mentions_a_policy_stays_as_does_a_text_without_any_to_the_letter():
    paragraph = "The council met. It spoke about its privacy policy. It then spoke of fish and of the new bridge."
    for text in (paragraph, " \r\nThe ferry left.\r\n\r\n"):
        assert lines.without_boilerplate(text, 0.5) == lines.without(text, lambda line: False) == (text, [])
    assert lines.without_boilerplate(paragraph, 0.1).text == ""


def test_a_line_recurs_whatever_its_case_and_blanks_but_not_where_it_is_short():
    assert len(list(lines.keys("You are here: Home\n  you ARE  here: home \n}\n"))) == 1
    assert list(lines.keys("return None\n}\nelse:")) == []
    assert lines.key("A b  c d ") == lines.key(" a B c d") != lines.key("a b c e")
