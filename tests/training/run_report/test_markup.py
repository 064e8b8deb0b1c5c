"""Text stays text, and markup stays markup."""

from __future__ import annotations

from training.run_report.markup import Markup, escaped, joined, table, tag


def test_text_is_escaped_in_content_and_in_attributes_and_only_once() -> None:
    element = tag("p", "<b>", tag("i", "&"), title='"><script>')
    assert element == '<p title="&quot;&gt;&lt;script&gt;">&lt;b&gt;<i>&amp;</i></p>'
    assert escaped(element) is element


def test_attributes_follow_their_values() -> None:
    assert (
        tag("a", class_="x", aria_label="y", hidden=True, open=False, id=None)
        == '<a class="x" aria-label="y" hidden></a>'
    )
    assert tag("img", alt="") == '<img alt="">'


def test_joined_leaves_out_what_is_none() -> None:
    assert joined(None, "a<", Markup("<br>")) == "a&lt;<br>"


def test_tables_have_a_caption_headings_of_rows_and_columns_and_numbers_on_the_right() -> None:
    shown = table(["name", "count"], [["<a>", 3]], "what")
    assert "<caption>what</caption>" in shown
    assert '<th scope="col">name</th><th scope="col" class="number">count</th>' in shown
    assert '<th scope="row">&lt;a&gt;</th><td class="number">3</td>' in shown
