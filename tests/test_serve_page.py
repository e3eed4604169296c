"""The page in headless Chromium, over models that say what a test wants: `make test-browser` runs this.

Whatever a test does, no page may log an error or a warning, nor ask anybody but its own server.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmlab.data.chat import Example, Message, ToolCall
from llmlab.data.config import DataConfig
from llmlab.data.sources import Report, documents
from tests.runs import ROOT
from tests.serve_for_tests import Scripted, indexed, opened_model, running, until

sync_api = pytest.importorskip("playwright.sync_api", reason="`make test-browser` installs Playwright, and runs this")
pytestmark = pytest.mark.slow
expect = sync_api.expect
expect.set_options(timeout=120_000)  # an engine compiles a shape when it is first met

PHONE, DESKTOP = (390, 844), (1280, 800)
KEY = "a-key-of-some-length"
SUM = Message("assistant", thinking="a sum", calls=(ToolCall("calculator", "12 + 30"),))
TEXT = "the quick brown fox\n日本語 🙂 jumps"


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        if not found and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install one, or run `playwright install chromium`")
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = playwright.chromium.launch(executable_path=found, args=arguments)
        yield made
        made.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = {"assistant": opened_model(reach=1024), "base": opened_model(chat=False, seed=8, reach=1024)}
    with running(tmp_path_factory.mktemp("serve"), models) as made:
        yield made


@pytest.fixture(scope="module")
def scripts(server):
    return {name: Scripted(model) for name, model in server.models.items()}


@pytest.fixture
def assistant(scripts):
    scripts["assistant"].forget()
    return scripts["assistant"]


@pytest.fixture
def base(scripts):
    scripts["base"].forget()
    return scripts["base"]


@pytest.fixture
def wrong():
    """What pages complain about, and whom else they ask: nothing is left in it when a test is over."""
    found = []
    yield found
    assert not found


@pytest.fixture
def visit(browser, server, wrong):
    """Opens the page, and waits until it can be used."""
    contexts = []

    def open_page(size=DESKTOP, scheme="light", url=server.url):
        touch = size == PHONE
        context = browser.new_context(
            viewport=dict(zip(("width", "height"), size, strict=True)),
            color_scheme=scheme,
            has_touch=touch,
            is_mobile=touch,
        )
        contexts.append(context)
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((f"{url}/", "data:")) or wrong.append(asked.url))
        page.goto(url)
        expect(page.get_by_role("tabpanel")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()


def send(page, text):
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()


def turns(page):
    return page.locator("#log .turn")


def at_rest(page):
    """Nothing is being written, and nothing went wrong."""
    expect(page.locator("body")).not_to_have_class("busy")
    expect(page.locator(".error")).to_have_count(0)


def ask(page, assistant, text, *answers):
    assistant.says(*answers)
    send(page, text)
    at_rest(page)


def adjust(page, **settings):
    page.get_by_role("button", name="Settings").click()
    for name, value in settings.items():
        box = page.locator(f"#{name}")
        box.set_checked(value) if isinstance(value, bool) else box.fill(str(value))
    page.get_by_role("button", name="Close").click()


def prompt_of(server, *conversation):
    """The ids that a conversation reaches the model as."""
    return tuple(server.models["assistant"].template.render(conversation, generate=True).ids)


def test_an_answer_is_shown_as_it_comes(visit, assistant):
    page = visit()
    go_on = assistant.says(Message("assistant", TEXT), hold=8)
    send(page, "What jumps?")
    said = turns(page).last.locator(".said")
    expect(said).to_have_text(re.compile("^the q"))
    assert said.inner_text() != TEXT
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    go_on.set()
    expect(said).to_have_text(TEXT)
    at_rest(page)
    expect(turns(page)).to_have_text(["youWhat jumps?", f"assistant{TEXT}"])
    expect(page.locator("#chat-note")).to_have_text(re.compile(r"^\d+ tokens, \d+/s$"))
    expect(page.get_by_label("Your message")).to_have_value("")


def test_stop_keeps_what_came_and_the_slot_is_free(visit, server, assistant):
    page = visit()
    go_on = assistant.says(Message("assistant", TEXT), hold=8)
    send(page, "What jumps?")
    said = turns(page).last.locator(".said")
    expect(said).to_have_text(re.compile("^the q"))
    cancelled = server.service.metrics.finished["cancelled"]
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#chat-note")).to_have_text("stopped")
    go_on.set()
    until(lambda: server.service.metrics.finished["cancelled"] == cancelled + 1)
    until(lambda: server.service.load["running"] == 0)
    kept = said.text_content()
    assert TEXT.startswith(kept)
    ask(page, assistant, "And?", Message("assistant", "a fox"))
    heard = (Message("user", "What jumps?"), Message("assistant", kept), Message("user", "And?"))
    assert assistant.asked[-1].prompt == prompt_of(server, *heard)


def test_regenerate_asks_the_same_again(visit, assistant):
    page = visit()
    ask(page, assistant, "What jumps?", Message("assistant", "a dog"))
    assistant.says(Message("assistant", "a fox"))
    page.get_by_role("button", name="Regenerate").click()
    expect(turns(page)).to_have_text(["youWhat jumps?", "assistanta fox"])
    at_rest(page)
    first, second = assistant.asked
    assert first.prompt == second.prompt
    assert first.sampling.seed != second.sampling.seed


def test_a_tool_runs_once_it_is_allowed_and_its_result_is_shown(visit, server, assistant):
    page = visit()
    assistant.says(SUM, Message("assistant", "It is 42."))
    send(page, "What is 12 + 30?")
    call = page.locator(".call")
    expect(call).to_contain_text('calculator {"input": "12 + 30"}')
    expect(call).not_to_contain_text("42")
    page.get_by_role("button", name="Run it").click()
    expect(call).to_contain_text("= 42")
    expect(turns(page).last).to_have_text("assistantIt is 42.")
    expect(page.locator(".thinking")).to_have_text("a sum")
    at_rest(page)
    heard = (Message("user", "What is 12 + 30?"), SUM, Message("tool", "42", name="calculator"))
    assert assistant.asked[-1].prompt == prompt_of(server, *heard)


@pytest.mark.parametrize("how", ["Decline", "Stop"])
def test_a_tool_that_is_not_allowed_does_not_run(visit, server, assistant, how):
    page = visit()
    assistant.says(SUM, *([Message("assistant", "As you like.")] if how == "Decline" else []))
    send(page, "What is 12 + 30?")
    page.get_by_role("button", name=how).click()
    expect(page.locator("body")).not_to_have_class("busy")
    question = Message("user", "What is 12 + 30?")
    if how == "Decline":
        expect(page.locator(".call")).to_contain_text("= error: the user has declined this call")
        expect(turns(page).last).to_have_text("assistantAs you like.")
    else:  # What came of the turn stays, without the call.
        ask(page, assistant, "Well?", Message("assistant", "Well."))
        heard = (question, Message("assistant", thinking="a sum"), Message("user", "Well?"))
        assert assistant.asked[-1].prompt == prompt_of(server, *heard)
    assert page.locator("#log").text_content().count("42") == 0


def test_tools_may_run_unasked_but_not_for_ever(visit, assistant):
    page = visit()
    adjust(page, trust=True)
    assistant.says(*[SUM] * 5)
    send(page, "What is 12 + 30?")
    expect(page.locator("#chat-note")).to_contain_text("no answer after 4 calls")
    expect(page.locator(".call")).to_have_text(['calculator {"input": "12 + 30"}= 42'] * 5)
    ask(page, assistant, "Well?", Message("assistant", "It is 42."))


def test_tools_that_are_not_offered_are_not(visit, assistant):
    page = visit()
    with page.expect_request("**/v1/chat/completions") as offered:
        ask(page, assistant, "Hello", Message("assistant", "Hello."))
    names = [tool["function"]["name"] for tool in offered.value.post_data_json["tools"]]
    assert names == ["calculator", "lookup"]
    adjust(page, tools=False)
    with page.expect_request("**/v1/chat/completions") as kept:
        ask(page, assistant, "Hello", Message("assistant", "Hello."))
    assert "tools" not in kept.value.post_data_json


def test_tokens_show_what_the_model_thought_of_them(visit, server, assistant):
    page = visit()
    adjust(page, scores=True)
    ask(page, assistant, "What jumps?", Message("assistant", TEXT))
    tokens = page.locator("#log .t")
    model = server.models["assistant"]
    ids = model.opened.tokenizer.encode(TEXT)
    expect(tokens).to_have_count(len(ids))
    assert "".join(tokens.all_text_contents()) == TEXT
    prompt = assistant.asked[0].prompt
    logits_TV = np.asarray(model.opened.model.logits(model.opened.params, np.array([[*prompt, *ids]], np.int32)))[0]
    logp_TV = logits_TV - np.log(np.exp(logits_TV.astype(np.float64)).sum(-1, keepdims=True))
    place = 3
    p_V = 100 * np.exp(logp_TV[len(prompt) + place - 1])
    tokens.nth(place).hover()
    tip = page.get_by_role("tooltip")
    expect(tip).to_be_visible()
    own = tip.locator(".own td").all_text_contents()
    assert own[0] == model.opened.tokenizer.piece(ids[place]).replace("▁", "·")
    shown = [float(text.removesuffix(" %")) for text in tip.locator("td:last-child").all_text_contents()]
    np.testing.assert_allclose(shown[:5], np.sort(p_V)[:-6:-1], atol=0.51)
    np.testing.assert_allclose(float(own[1].removesuffix(" %")), p_V[ids[place]], atol=0.51)
    bounds = sum(-math.log(p_V[ids[place]] / 100) > bound for bound in (0.1, 0.7, 2, 4, 7))
    expect(tokens.nth(place)).to_have_class(f"t s{bounds}")
    page.get_by_label("Your message").hover()
    expect(tip).to_be_hidden()


def test_tokens_by_keyboard_and_by_finger(visit, assistant):
    page = visit(PHONE)
    adjust(page, scores=True)
    ask(page, assistant, "What jumps?", Message("assistant", TEXT))
    tip, tokens = page.get_by_role("tooltip"), page.locator("#log .t")
    tokens.nth(2).tap()
    expect(tip).to_be_visible()
    expect(tokens.nth(2)).to_be_focused()  # the last that a tap does: it would show the tip once more
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.get_by_label("Your message").focus()
    page.keyboard.press("Shift+Tab")  # one stop for all tokens
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(tip.locator(".own")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(tokens.first).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Your message")).to_be_focused()
    expect(tip).to_be_hidden()


@pytest.mark.parametrize("better", ["A", "B"])
def test_a_vote_is_a_row_that_reward_models_train_on(visit, server, assistant, better):
    votes = server.folder / "votes.jsonl"
    votes.unlink(missing_ok=True)
    page = visit()
    adjust(page, system="Be brief.")
    page.get_by_role("tab", name="Compare").click()
    answers = {"A": "a fox 🙂", "B": "a dog\nand a fox"}
    assistant.says(*(Message("assistant", text) for text in answers.values()))
    page.get_by_label("What both answer").fill("What jumps?")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name=f"{better} is better").click()
    expect(page.locator("#vote-note")).to_have_text(f"kept in {votes}")
    expect(page.locator("#comparison")).to_contain_text("Aa fox 🙂")
    for button in ("A is better", "B is better"):  # one vote a pair
        expect(page.get_by_role("button", name=button)).to_be_disabled()

    config = DataConfig(source="jsonl", files=(str(votes),), rows="preference")
    (row,) = documents(config, "all", Report())
    chosen, rejected = (response.conversation for response in Example.loads(row.text).responses)
    asked = (Message("system", "Be brief."), Message("user", "What jumps?"))
    assert chosen[:-1] == rejected[:-1]
    assert [turn[:2] for turn in chosen[:-1]] == [turn[:2] for turn in asked]
    worse = {"A": "B", "B": "A"}[better]
    assert (chosen[-1].content, rejected[-1].content) == (answers[better], answers[worse])


@pytest.mark.parametrize(
    "answers, most, why",
    [
        (("same", "same"), 64, "they are the same"),
        (("a fox", ""), 64, "one is empty"),
        (("ab", "a" * 60), 8, "was cut"),
    ],
)
def test_no_vote_on_what_would_teach_nothing_good(visit, assistant, answers, most, why):
    page = visit()
    adjust(page, max_tokens=most)
    page.get_by_role("tab", name="Compare").click()
    assistant.says(*(Message("assistant", text) for text in answers))
    page.get_by_label("What both answer").fill("What jumps?")
    page.keyboard.press("Enter")
    expect(page.locator("#vote-note")).to_contain_text(why)
    for button in ("A is better", "B is better"):
        expect(page.get_by_role("button", name=button)).to_be_disabled()


def test_a_base_model_goes_on_from_a_text(visit, base):
    page = visit()
    page.get_by_label("Model").select_option("base")
    for name in ("Chat", "Compare"):
        expect(page.get_by_role("tab", name=name)).to_be_disabled()
    expect(page.get_by_role("tab", name="Complete")).to_have_attribute("aria-selected", "true")
    base.says(" quick 日本語")
    page.get_by_label("The text to go on from").fill("the")
    page.get_by_role("button", name="Go on", exact=True).click()
    expect(page.locator("#written")).to_have_text("the quick 日本語")
    adjust(page, scores=True)
    base.says(" brown 🙂")
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#written")).to_have_text("the quick 日本語 brown 🙂</s>")
    at_rest(page)
    base.says(" fox")  # What was kept is the text, and not how its tokens are shown.
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_label("The text to go on from")).to_have_value("the quick 日本語 brown 🙂")
    at_rest(page)
    go_on = base.says(" dog", hold=1)
    page.get_by_label("The text to go on from").fill("a")
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#complete-note")).to_have_text("stopped")
    go_on.set()


def test_a_text_in_its_tokens(visit, server):
    page = visit()
    page.get_by_role("tab", name="Tokens").click()
    page.get_by_label("Text to split into tokens").fill(TEXT)
    model = server.models["assistant"]
    ids = model.opened.tokenizer.encode(TEXT)
    expect(page.locator("#token-count")).to_contain_text(f"{len(ids)} tokens, {len(TEXT)} characters")
    expect(page.locator("#ids")).to_have_text(" ".join(map(str, ids)))
    piece = page.locator("#pieces .t").nth(1)
    piece.hover()
    expect(page.get_by_role("tooltip")).to_contain_text(f"id {ids[1]}bytes")
    page.get_by_label("As your turn in a conversation").check()
    spoken = prompt_of(server, Message("user", TEXT))
    expect(page.locator("#ids")).to_have_text(" ".join(map(str, spoken)))
    expect(page.locator("#pieces")).to_contain_text("<|user|>")
    page.get_by_label("Model").select_option("base")
    ids = server.models["base"].opened.tokenizer.encode(TEXT)
    expect(page.locator("#ids")).to_have_text(" ".join(map(str, ids)))


def test_settings_reach_the_model(visit, server, assistant):
    page = visit()
    given = {"temperature": 0.25, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "seed": 7, "max_tokens": 33}
    adjust(page, system="Be brief.\nBe kind.", **given)
    ask(page, assistant, "Hello", Message("assistant", "Hello."))
    (asked,) = assistant.asked
    assert asked.prompt == prompt_of(server, Message("system", "Be brief.\nBe kind."), Message("user", "Hello"))
    got = asked.sampling
    assert [got.temperature, got.top_p, got.top_k, got.repetition, got.seed] == list(given.values())[:5]
    assert asked.max_tokens == 33
    adjust(page, **{"stop-text": " fox"})
    ask(page, assistant, "What jumps?", Message("assistant", "a quick fox and a dog"))
    expect(turns(page).last).to_have_text("assistanta quick")


def test_a_short_model_is_not_asked_for_more_than_it_can_write(visit, tmp_path):
    with running(tmp_path, {"short": opened_model(reach=200)}) as short:
        script = Scripted(short.models["short"])
        page = visit(url=short.url)
        ask(page, script, "Hello", Message("assistant", "Hello."))
        assert script.asked[0].max_tokens == 100
        page.close()  # before its server goes


def test_by_keyboard_alone(visit, assistant):
    page = visit()
    press = page.keyboard.press

    def focused(role, name):
        expect(page.get_by_role(role, name=name)).to_be_focused()

    press("Tab")
    focused("combobox", "Model")
    press("Tab")
    focused("tab", "Chat")
    press("ArrowRight")
    focused("tab", "Compare")
    expect(page.get_by_label("What both answer")).to_be_visible()
    press("ArrowLeft")
    press("Tab")
    focused("button", "Settings")
    press("Enter")
    focused("button", "Close")
    press("Tab")
    focused("textbox", "System prompt")
    page.keyboard.type("one")
    press("Enter")  # a line of the prompt, and no submission
    expect(page.get_by_label("System prompt")).to_have_value("one\n")
    press("Escape")
    expect(page.get_by_label("System prompt")).to_be_hidden()
    focused("button", "Settings")
    press("Tab")
    focused("textbox", "Your message")
    page.keyboard.type("What is")
    press("Shift+Enter")
    page.keyboard.type("12 + 30?")
    assistant.says(SUM, Message("assistant", "It is 42."))
    press("Enter")
    focused("button", "Run it")
    press("Enter")
    expect(turns(page).last).to_have_text("assistantIt is 42.")
    expect(turns(page).first.locator(".said")).to_have_text("What is\n12 + 30?")
    press("Tab")
    focused("textbox", "Your message")
    assistant.says(Message("assistant", TEXT), hold=8)
    page.keyboard.type("What jumps?")
    press("Enter")
    expect(turns(page).last).to_have_text(re.compile("the q"))
    press("Escape")
    expect(page.locator("#chat-note")).to_have_text("stopped")
    focused("textbox", "Your message")
    press("Tab")
    press("Tab")
    focused("button", "Regenerate")


FILLED = """() => [...document.querySelectorAll("button, select, input, textarea, summary")]
  .filter((each) => each.checkVisibility())
  .map((each) => (each.type === "checkbox" ? each.closest("label") : each))
  .map((each) => [each.id || each.textContent.trim(), each.getBoundingClientRect().toJSON()])"""
# The contrast of every text with what is behind it, as WCAG 2 computes it.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colors) => {
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (each) => (each ? [...behind(each.parentElement), getComputedStyle(each).backgroundColor] : ["#fff"]);
  return [...document.querySelectorAll("body *")]
    .filter((each) => each.checkVisibility() && !each.disabled && each.tagName !== "SCRIPT")
    .filter((each) => [...each.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
    .map((each) => {
      const [low, high] = [over(behind(each)), over([...behind(each), getComputedStyle(each).color])].sort();
      return [`${each.className} ${each.textContent}`, (high + 0.05) / (low + 0.05)];
    });
}"""


def assert_fits(page, size):
    """Nothing is out of reach, too small to be hit, or hard to read."""
    assert page.evaluate("document.scrollingElement.scrollWidth") <= size[0]
    for name, box in page.evaluate(FILLED):
        assert 0 <= box["left"] <= box["right"] <= size[0], name
        assert min(box["width"], box["height"]) >= (40 if size == PHONE else 24), (name, box)
    for what, contrast in page.evaluate(CONTRAST):
        assert contrast >= 4.5, (what, contrast)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_every_view_fits_and_can_be_read(visit, assistant, size, scheme):
    page = visit(size, scheme)
    luminance = sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))
    assert (luminance > 600) == (scheme == "light")
    assert_fits(page, size)
    assistant.says(SUM, Message("assistant", "It is 42."))
    send(page, "What is 12 + 30?")
    expect(page.get_by_role("button", name="Run it")).to_be_visible()
    assert_fits(page, size)
    page.get_by_role("button", name="Run it").click()
    at_rest(page)
    adjust(page, scores=True)
    ask(page, assistant, "What jumps?" * 20, Message("assistant", "https://" + 60 * "fox" + TEXT))
    page.locator("#log .t").last.focus()
    expect(page.get_by_role("tooltip")).to_be_in_viewport(ratio=1)
    assert_fits(page, size)
    bottom = page.get_by_role("button", name="Send").bounding_box()
    assert bottom["y"] + bottom["height"] <= size[1]
    page.get_by_role("button", name="Settings").click()
    assert_fits(page, size)
    page.get_by_label("Key, where").scroll_into_view_if_needed()
    expect(page.get_by_label("Key, where")).to_be_in_viewport()
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Compare").click()
    assistant.says(Message("assistant", "fox" * 50), Message("assistant", TEXT))
    page.get_by_label("What both answer").fill("What jumps?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="A is better")).to_be_enabled()
    assert_fits(page, size)
    one, other = (page.locator(f"#answer-{side}").bounding_box() for side in (0, 1))
    assert (one["x"] == other["x"]) == (size == PHONE)
    page.get_by_role("tab", name="Complete").click()
    assert_fits(page, size)
    page.get_by_role("tab", name="Tokens").click()
    page.get_by_label("Text to split into tokens").fill(TEXT * 20)
    expect(page.locator("#ids")).not_to_be_empty()
    assert_fits(page, size)


def test_an_answer_from_files_shows_its_sources(visit, tmp_path):
    with running(tmp_path, {"tiny": opened_model(reach=1024)}, find=indexed(tmp_path)) as made:
        script, page = Scripted(made.models["tiny"]), visit(PHONE, url=made.url)
        ask(page, script, "Does a lazy fox or a cat jump?", Message("assistant", "It does [1]."))
        sources = page.locator(".sources")
        expect(sources.locator("summary")).to_have_text("Sources: [1] fox.md:1-1")
        expect(sources).not_to_contain_text("lazy dog", use_inner_text=True)
        sources.locator("summary").click()
        expect(sources).to_contain_text("[1] fox.md:1-1The fox jumps over the lazy dog.")
        expect(sources).to_contain_text("[2] cat.md:1-1")
        assert_fits(page, PHONE)
        adjust(page, passages=False)
        ask(page, script, "And a cat?", Message("assistant", "It does."))
        expect(sources).to_have_count(1)
        # What was said before is kept as it was typed: passages come with the last question alone.
        heard = (
            Message("user", "Does a lazy fox or a cat jump?"),
            Message("assistant", "It does [1]."),
            Message("user", "And a cat?"),
        )
        assert script.asked[-1].prompt == tuple(made.models["tiny"].template.render(heard, generate=True).ids)
        page.close()  # before its server goes


def test_a_reload_begins_anew_and_nothing_was_kept(visit, server, assistant):
    page = visit()
    ask(page, assistant, "What jumps?", Message("assistant", "a fox"))
    page.reload()
    expect(turns(page)).to_have_count(0)
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    ask(page, assistant, "What jumps?", Message("assistant", "a fox"))
    page.get_by_role("button", name="New").click()
    ask(page, assistant, "And?", Message("assistant", "a dog"))
    assert assistant.asked[-1].prompt == prompt_of(server, Message("user", "And?"))
    expect(turns(page)).to_have_count(2)


def test_what_the_server_refuses_is_said_and_can_be_asked_again(visit, assistant, wrong):
    page = visit()
    adjust(page, temperature=-1)
    send(page, "Hello")
    note = page.locator("#chat-note")
    expect(note).to_have_text("temperature: -1 should be from 0 to 100")
    expect(note).to_have_class("note error")
    expect(turns(page)).to_have_text(["youHello"])
    adjust(page, temperature=1)
    assistant.says(Message("assistant", "Hello."))
    page.get_by_role("button", name="Regenerate").click()
    expect(turns(page)).to_have_text(["youHello", "assistantHello."])
    assert len(wrong) == 1
    assert "400" in wrong.pop()  # Chromium logs every answer that is none


def test_one_answer_at_a_time(visit, assistant):
    page = visit()
    go_on = assistant.says(Message("assistant", TEXT), hold=8)
    send(page, "What jumps?")
    page.get_by_role("tab", name="Complete").click()
    page.get_by_role("button", name="Go on", exact=True).click()
    expect(page.locator("#complete-note")).to_have_text("an answer is being written: stop it first")
    page.get_by_role("tab", name="Chat").click()
    go_on.set()
    expect(turns(page).last).to_have_text(f"assistant{TEXT}")
    assert len(assistant.asked) == 1


def test_a_key_is_asked_for(visit, tmp_path, wrong):
    with running(tmp_path, {"tiny": opened_model()}, keys=(KEY,)) as keyed:
        page = visit(url=keyed.url)
        box = page.get_by_label("Key, where the server asks for one")
        expect(box).to_be_focused()
        assert wrong
        assert all("401" in said for said in wrong)
        wrong.clear()
        box.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.get_by_label("Model")).to_have_value("tiny")
        expect(page.get_by_label("Your message")).to_be_visible()
        page.close()  # before its server goes


def test_what_a_model_says_is_text(visit, assistant, wrong):
    page = visit()
    hostile = "<img src=https://example.org/x onerror=alert(1)> <script>alert(2)</script>"
    ask(page, assistant, hostile, Message("assistant", hostile))
    expect(turns(page)).to_have_text([f"you{hostile}", f"assistant{hostile}"])
    # Nor would markup do anything, were there any.
    page.evaluate("html => { document.getElementById('log').innerHTML = html; }", hostile)
    until(lambda: page.evaluate("1") and len(wrong) == 3)
    said = "\n".join(wrong)
    assert "inline event handler violates" in said
    assert "'https://example.org/x' violates" in said
    wrong.clear()


def test_the_assistant_answers_a_sum_through_its_tool(visit):
    """Of the run that LLMLAB_ASSISTANT names, such as runs/assistant/dpo."""
    workdir = os.environ.get("LLMLAB_ASSISTANT")
    if not workdir:
        pytest.skip("LLMLAB_ASSISTANT names no run: `make assistant test-browser` trains one, and asks it")
    command = [sys.executable, "-m", "llmlab", "serve", f"--workdir={Path(workdir).absolute()}", "--port=0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        url = None
        for line in process.stderr:
            said.append(line)
            if url := re.search(r"serving at (http://\S+)", line):
                break
        assert url, "".join(said)
        page = visit(url=url[1])
        adjust(page, temperature=0)
        send(page, "What is 12 + 30?")
        page.get_by_role("button", name="Run it").click(timeout=120_000)
        expect(page.locator(".call").first).to_have_text(re.compile(r"^calculator .*12 ?\+ ?30.*= 42$"))
        expect(turns(page).last.locator(".said")).to_contain_text("42", timeout=120_000)
        at_rest(page)
    finally:
        process.terminate()
        process.communicate(timeout=60)
