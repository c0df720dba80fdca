import html.parser
import json
import math
import re

import pytest

from jaxllm.pipeline import report

EVIL = "<script>alert('1')</script>\"'>&amp;\x00\ud800{{ 7 * 7777 }}"
VOID = {"meta", "br"}
SHAPES = {"path", "circle", "line", "rect"}  # of SVG: they may close themselves


def interval(value, low, high):
    return {"value": value, "low": low, "high": high, "count": 200}


def life():
    """A whole report of four stages, one of them tried twice."""
    stage = dict(about="Learns.", low=None, high=None, best="max", passed=True, attempts=1, seconds=60.0, tried=[])
    spent = dict(tokens=200_000, flops=3e12, mfu=0.25, command="python experiments/train.py --config=configs/sft.py")
    nothing = dict(tokens=None, flops=None, mfu=None, command="python experiments/lessons.py")
    changes = {"loop.steps": [200, 300], "name": "other"}
    tried = [dict(attempt=1, value=0.7, passed=False, changes={}), dict(attempt=2, value=0.86, passed=True)]
    tried[1]["changes"] = changes
    answers = interval(0.86, 0.81, 0.9)
    sums = dict(value=0.35, low=None, high=None, threshold=0.3, bound="least", over="sft", passed=True)
    kl = dict(value=7.5, low=7.0, high=8.0, threshold=10, bound="most", over="", passed=True)
    return {
        "title": "A small life",
        "ok": True,
        "seconds": 300.0,
        "seed": 3,
        "environment": {
            "python": "3.11.9",
            "packages": {"jax": "0.10.2"},
            "device": "cpu",
            "devices": 8,
            "commit": "abc123",
            "command": ["experiments/quickstart.py", "--workdir=a b"],
        },
        "stages": [
            stage | nothing | dict(name="world", metric="documents", value=4000, threshold=1000),
            stage | spent | dict(name="random", metric="text.bits", value=8.0, threshold=7.5),
            stage | spent | answers | dict(name="sft", metric="answers.exact", threshold=0.8, attempts=2, tried=tried),
            stage | spent | sums | dict(name="grpo", metric="sums.exact", gates={"manner.kl": kl, "sums.exact": sums}),
        ],
        "measures": {
            "answers.exact": {"about": "Answers that are right.", "best": "max", "unit": "share"},
            "sums.exact": {"about": "Sums that are right", "best": "max", "unit": "share"},
            "manner.kl": {"about": "Distance from SFT", "best": "min", "unit": "nats"},
        },
        "board": [
            {"stage": "random", "values": {"answers.exact": interval(0.0, 0.0, 0.02)}},
            {"stage": "sft", "values": {"answers.exact": answers, "manner.kl": interval(0.0, 0.0, 0.0)}},
            {"stage": "grpo", "values": {"answers.exact": interval(0.7, 0.64, 0.76), "manner.kl": interval(7, 6, 8)}},
        ],
        "questions": [
            {"prompt": "Where does Anna live?", "kind": "chat", "expected": ["Anna lives in Juno.", "In Juno."]},
            {"prompt": "The road to", "kind": "text", "expected": None},
        ],
        "transcript": {"grpo": ["Anna lives in Juno.", ""], "random": ["qq\nzz", None], "sft": ["Anna lives in Birk."]},
        "curves": {"sft": [{"step": step, "loss": 5.0 / step, "reward": 0.1 * step} for step in range(1, 30)]},
        "filtered": {
            "kept": {"documents": 900, "bytes": 81_000},
            "dropped": {
                "few": {"documents": 20, "bytes": 2_000, "examples": ["x" * 500]},
                "near_duplicate": {"documents": 80, "bytes": None, "examples": []},
            },
            "removed": {"menu": {"lines": 7, "bytes": 70, "examples": []}},
            "planted": {"repeated": [59, 60]},
            "clean": {"documents": 900, "lost": 2},
        },
        "failures": [],
    }


class Reader(html.parser.HTMLParser):
    """What a browser would see: raises where tags do not close each other in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words, self.svg = [], [], [], False
        self.feed(page)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"{tag} says something twice: {attributes}"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in SHAPES, f"{tag} does not close itself in HTML"
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, *names):
        return [(tag, attributes) for tag, attributes in self.tags if tag in names]


def changed(value, change):
    """The report with every leaf changed."""
    if isinstance(value, dict):
        return {key: changed(each, change) for key, each in value.items()}
    return [changed(each, change) for each in value] if isinstance(value, list) else change(value)


def numbers_to(new):
    return lambda value: new if isinstance(value, int | float) and not isinstance(value, bool) else value


def test_the_page_says_what_was_reached_and_what_it_took():
    text = Reader(report.html(life())).text
    assert "✓ Passed all 5 gates" in text
    for what in (
        "Time 5 min",
        "Tokens trained on 600 k",
        "FLOPs 9 T",
        "Stages run again 1",
        "Seed 3",
        "Device 8 × cpu",
    ):
        assert what in text.replace("\u00a0", " ")
    for what in ("86 %", "≥ 80 %", "81 to 90 %", "25 %", "Attempt 2:", "200 → 300", "python experiments/quickstart.py"):
        assert what in text.replace("\u00a0", " ")


def test_tags_close_in_order_and_ids_are_unique_and_every_link_leads_somewhere_on_the_page():
    page = Reader(report.html(life()))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    links = [attributes["href"] for _, attributes in page.all("a")]
    assert len(set(ids)) == len(ids) and links
    assert set(links) <= {f"#{name}" for name in ids}


def test_the_page_loads_nothing_and_runs_nothing():
    page = report.html(life())
    assert not re.search(r"https?:|//\w|url\(|@import|src=|<script|<link|<iframe|javascript:|\son\w+=", page)


def test_headings_stand_in_order_and_tables_say_what_their_cells_are():
    page = Reader(report.html(life() | {"failures": ["it failed"]}))
    levels = [int(tag[1]) for tag, _ in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert len(page.all("table")) == len(page.all("caption")) == 4
    assert all(attributes["scope"] in ("col", "row") for _, attributes in page.all("th"))
    for _, attributes in page.all("svg"):
        assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
    assert ("html", {"lang": "en"}) in page.tags
    assert any(attributes.get("name") == "viewport" for _, attributes in page.all("meta"))
    assert "prefers-color-scheme: dark" in report.html(life())


def test_everything_that_is_given_is_escaped():
    evil = changed(life(), lambda value: EVIL + value if isinstance(value, str) else value)
    evil["transcript"] = {EVIL + name: answers for name, answers in evil["transcript"].items()}
    evil["curves"] = {EVIL: evil["curves"]["sft"]}
    for part, names in (("measures", evil["measures"]), ("dropped", evil["filtered"]["dropped"])):
        holder = evil if part == "measures" else evil["filtered"]
        holder[part] = {EVIL + name: value for name, value in names.items()}
    page = report.html(evil)
    page.encode("utf-8")
    assert "\x00" not in page and "<script" not in page and "54439" not in Reader(page).text
    assert Reader(page).text.count("alert('1')") > 40
    sane = [tag for tag, _ in Reader(report.html(life())).tags]
    assert set(tag for tag, _ in Reader(page).tags) <= {*sane, "mark"}


@pytest.mark.parametrize("new", [None, math.nan, math.inf, 0, -1.0, "NaN", 1e30])
def test_a_report_of_odd_numbers_can_be_read(new):
    text = Reader(report.html(changed(life(), numbers_to(new)))).text
    assert "A small life" in text
    assert not re.search(r"\b(nan|inf|None)\b", text)


@pytest.mark.parametrize("name", sorted(life()))
def test_whatever_is_missing_or_empty_is_left_out(name):
    whole = life()
    for found in (whole | {name: None}, {key: value for key, value in whole.items() if key != name}):
        assert "Run it again" in Reader(report.html(found)).text
    if isinstance(whole[name], list | dict):
        assert "Run it again" in Reader(report.html(whole | {name: type(whole[name])()})).text


def test_a_stage_and_a_measure_of_which_only_the_name_is_known_can_be_read():
    found = {"stages": [{"name": "sft"}], "board": [{"stage": "sft", "values": {"exact": {"value": 0.5}}}]}
    text = Reader(report.html(found | {"questions": [{}], "transcript": {"sft": [None]}})).text
    assert "not run: sft" in text and "exact" in text and "not asked" in text
    Reader(report.html({}))


@pytest.mark.parametrize(
    "ok, passed, text, sign",
    [
        (True, (True, True), "Passed all 3 gates", "✓"),
        (False, (True, True), "Passed 3 gates so far", "–"),
        (False, (True, False), "Failed 1 of 3 gates: grpo", "✗"),
        (False, (False, False), "Failed 2 of 3 gates: sft, grpo", "✗"),
        (True, (True, False), "Failed 1 of 3 gates: grpo", "✗"),
        (False, (True, None), "Passed 1 of 3 gates; not run: grpo", "–"),
    ],
)
def test_the_verdict_is_that_of_the_gates(ok, passed, text, sign):
    first, second = passed
    gates = {"exact": {"value": 1.0, "threshold": 0.5, "passed": second}, "kl": {"value": 1.0, "threshold": 2.0}}
    gates["kl"]["passed"] = None if second is None else True
    stages = [
        {"name": "sft", "metric": "exact", "value": 0.5, "threshold": 0.8, "passed": first},
        {"name": "grpo", "metric": "exact", "passed": second, "gates": gates},
    ]
    page = Reader(report.html({"ok": ok, "stages": stages}))
    assert f"{sign} {text} " in page.text
    assert ("h1", {"class": {"✓": "passed", "✗": "failed", "–": "not-run"}[sign]}) in page.tags


def test_a_gate_says_its_bound_and_differences_of_shares_are_points():
    found = life()
    sums, kl = report.page(found)["stages"][3]["gates"]
    assert (sums["name"], kl["name"]) == ("sums: exact", "manner: kl")  # that of the stage's metric comes first
    assert (sums["value"], sums["needs"], sums["over"]) == ("35 points", "≥ 30 points", "sft")
    assert (kl["value"], kl["needs"], kl["interval"]) == ("7.5 nats", "≤ 10 nats", "7 to 8")
    assert report.page(found)["stages"][2]["gates"][0]["needs"] == "≥ 80\u00a0%"
    text = Reader(report.html(found)).text.replace("\u00a0", " ")
    assert "sums: exact, over that of sft 35 points needs ≥ 30 points" in text
    assert "manner: kl 7.5 nats needs ≤ 10 nats" in text


def test_attempts_are_shown_where_there_were_several_with_what_was_changed():
    first, second = report.page(life())["stages"][2]["tried"]
    assert (first["value"], first["outcome"][0], first["changes"]) == ("70\u00a0%", "failed", {})
    assert second["changes"] == {"loop.steps": "200 → 300", "name": "other"}
    once = life()
    once["stages"][2]["tried"] = once["stages"][2]["tried"][1:]
    assert "Attempt 2" in Reader(report.html(life())).text and "Attempt 2" not in Reader(report.html(once)).text


@pytest.mark.parametrize(
    "now, before, best, change",
    [
        ((0.8, 0.75, 0.85), (0.7, 0.65, 0.75), "max", "better"),
        ((0.8, 0.75, 0.85), (0.7, 0.65, 0.75), "min", "worse"),
        ((0.7, 0.65, 0.75), (0.8, 0.75, 0.85), "max", "worse"),
        ((0.75, 0.70, 0.80), (0.7, 0.65, 0.75), "max", "same"),  # 0.05 within the root of 2 * 0.05^2
        ((0.78, 0.73, 0.83), (0.7, 0.65, 0.75), "max", "better"),  # 0.08 beyond it, though the intervals overlap
        ((0.8, 0.79, 1.0), (0.7, 0.2, 0.71), "max", "better"),  # only the ends that face each other count
        ((0.8, 0.6, 0.81), (0.7, 0.69, 0.71), "max", "same"),
        ((0.7, 0.69, 0.71), (0.8, 0.6, 0.81), "max", "same"),
        ((0.8, None, None), (0.7, None, None), "max", ""),  # by chance or not: nobody knows
        ((0.8, None, 0.85), (0.7, 0.65, 0.75), "max", ""),
        ((0.8, 0.75, None), (0.7, None, 0.75), "max", "better"),  # the ends that face each other are known
        ((None, None, None), (0.7, 0.6, 0.8), "max", ""),
        ((0.8, 0.7, 0.9), (math.nan, None, None), "max", ""),
    ],
)
def test_a_change_counts_where_it_is_beyond_chance(now, before, best, change):
    assert report.change(interval(*now), interval(*before), best) == change


def test_the_scoreboard_compares_each_stage_with_the_one_before_or_the_one_it_came_from():
    changes = [[cell["change"] for cell in line["cells"]] for line in report.page(life())["board"]["lines"]]
    assert changes == [["", "better", "worse"], ["", "", "worse"]]
    found = life()
    found["board"][2]["from"] = "random"
    line = report.page(found)["board"]["lines"][0]
    assert [cell["change"] for cell in line["cells"]] == ["", "better", "better"]
    assert (line["about"], line["best"], line["counts"]) == ("Answers that are right", "Higher is better", "200")
    page = Reader(report.html(life())).text
    for sign, meaning in report.CHANGES.values():
        assert f"{sign} {meaning}" in page


def test_the_transcript_stands_in_the_order_of_the_stages():
    shown = report.page(life())["transcript"]
    assert [answer["stage"] for answer in shown[0]["answers"]] == ["random", "sft", "grpo"]
    assert [answer["right"] for answer in shown[0]["answers"]] == [False, False, True]
    text = Reader(report.html(life())).text
    assert "One of its questions, first and last Where does Anna live? random qq zz grpo Anna lives in Juno." in text
    assert "The road to … Text to continue. random not asked sft not asked grpo nothing" in text


def test_curves_stand_by_what_they_measure():
    found = life()
    found["curves"]["pretrain"] = [{"step": 1, "loss": 2.0}]
    found["curves"]["world"] = []
    assert [(title, [name for name, _ in each]) for title, each in report.page(found)["curves"]] == [
        ("Loss, nats", ["sft", "pretrain"]),  # no stage is called pretrain: it comes last
        ("Reward", ["sft"]),
    ]


def test_what_was_filtered_is_counted_with_examples_cut_short():
    found = report.page(life())["filtered"]
    assert (found["total"], found["kept"]["documents"], found["kept"]["bytes"]) == ("1,000", "900", "81\u00a0kB")
    assert [(part["reason"], part["documents"], part["share"]) for part in found["dropped"]] == [
        *(("near duplicate", "80", 0.08), ("few", "20", 0.02))
    ]
    assert found["dropped"][1]["examples"] == ["x" * 280 + " …"]
    text = Reader(report.html(life())).text
    assert "kept: menu 7." in text
    assert "repeated 59 of 60. Of 900 clean documents 2 were dropped wrongly." in text


def test_time_outside_of_the_stages_is_the_rest():
    found = report.page(life())["times"]
    assert [(part["name"], part["seconds"], part["share"]) for part in found][3:] == [
        *(("grpo", "1\u00a0min", "20\u00a0%"), ("the rest", "1\u00a0min", "20\u00a0%"))
    ]
    assert [part["name"] for part in report.page(life() | {"seconds": 240.0})["times"]][-1] == "grpo"
    assert report.page({"stages": [{"name": "a", "seconds": 0}, {"name": "b"}]})["times"] == []


def test_the_command_can_be_copied_as_it_stands():
    assert report.page(life())["environment"]["command"] == "python experiments/quickstart.py '--workdir=a b'"
    assert ("jax", "0.10.2") in report.page(life())["environment"]["packages"]


def test_a_long_life_is_a_small_page_made_quickly_and_from_plain_json():
    found = life()
    curve = [{"step": step, "loss": 3 + math.sin(step), "validation_loss": 3.0, "kl": step / 7} for step in range(2000)]
    found["curves"] = {f"stage {number}": curve for number in range(6)}
    found["transcript"] = {name: ["word " * 2000] * 20 for name in ("random", "sft", "grpo")}
    found["questions"] = [{"prompt": "a"}] * 20
    page = report.html(json.loads(json.dumps(found)))
    assert len(page.encode()) < 1_000_000
