from html.parser import HTMLParser

import pytest

from llmlab.report.page import COLOURS, DASHES, Html, escape, fold, page, pairs, section, stroke, table, tiles, verbatim


class Text(HTMLParser):
    """Every tag, and the text inside."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(markup)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


HOSTILE = "</script></pre><img src=x onerror=alert(1)>&amp;\"'"


@pytest.mark.parametrize(
    "markup",
    [
        verbatim(HOSTILE),
        table(["a"], [[HOSTILE]]),
        pairs({"name": HOSTILE}),
        fold(HOSTILE, ""),
        tiles([("label", HOSTILE, "")]),
        section("s", HOSTILE, "x"),
    ],
)
def test_text_never_becomes_markup(markup):
    parsed = Text(markup)
    assert HOSTILE in parsed.text
    assert "img" not in parsed.tags
    assert "script" not in parsed.tags


def test_markup_passes_where_it_is_marked_as_such():
    assert escape(Html("<b>")) == "<b>"
    assert escape("<b>") == "&lt;b&gt;"


def test_control_characters_are_shown_and_lone_surrogates_survive_encoding():
    assert escape("a\x00b\x1b\r\n\tc") == "a\u2400b\u241b\u240d\n\tc"
    assert page(escape("\ud800"), "", []).decode()


def test_a_section_without_content_is_no_section():
    assert section("s", "Title", "") == ""
    assert pairs({}) == ""


def test_the_page_is_light_and_dark_fits_a_phone_and_may_fetch_nothing():
    text = page("t", "s", []).decode()
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert "default-src 'none'" in text


def test_strokes_repeat_only_after_every_colour_and_dash():
    count = COLOURS * DASHES
    assert len({stroke(i) for i in range(count)}) == count
    assert stroke(count) == stroke(0)
