"""The report: one offline page from whatever files a run has, refusing only damaged ones."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from longer_rec.errors import DataError
from longer_rec.report.charts import moving_mean
from longer_rec.report.html import fact, highlight_yaml, title, write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Text by section, ids and external references of a page; fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.references, self.sections, self.graphics = [], [], [], {"": ""}, 0
        self.feed(html)
        self.close()
        assert not self.open
        self.sections = {name: " ".join(text.split()) for name, text in self.sections.items()}

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [attributes[key] for key in ("src", "href", "xlink:href") if key in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.graphics += tag == "svg"
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        section = next((name for tag, name in reversed(self.open) if tag == "section"), "")
        self.sections[section] = self.sections.get(section, "") + " " + text


def assert_self_contained(html):
    """Nothing is fetched, no script runs, ids are unique, and drawings take their colours from the theme."""
    page = Page(html)
    assert not re.search(r"http|<script|@import", html)
    targets = [reference.removeprefix("#") for reference in page.references] + re.findall(r"url\(#(.*?)\)", html)
    assert set(targets) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == page.graphics > 0
    for drawing in drawings:
        assert not re.search(r"#[0-9a-f]{6}\b", drawing)
        assert "var(--" in drawing


def shard(rank, offset, rows, dim):
    return {"rank": rank, "offsets": [offset, 0], "sizes": [rows, dim]}


def table(name, rows, dim, shards, sharding_type):
    ranks = [each["rank"] for each in shards] or [0, 1]
    return {"table": name, "rows": rows, "dim": dim, "sharding_type": sharding_type, "kernel": "fused", "ranks": ranks,
            "shards": shards, "weight_bytes": rows * dim * 4, "optimizer_bytes": rows * 4}


PLAN = {"world_size": 3, "tables": [
    table("user", 1000, 8, [shard(0, 0, 1000, 8)], "table_wise"),
    table("item", 4096, 16, [shard(0, 0, 2048, 16), shard(1, 2048, 2048, 16)], "row_wise")]}
RESULTS = [
    {"name": "longer", "auc": 0.75, "logloss": 0.4, "ne": 0.8, "calibration": 1.02, "gauc": math.nan, "train_s": 178.0,
     "num_candidates": 601_224, "num_gauc_users": 2177},
    {"name": "<count>", "auc": 0.71, "logloss": 0.43, "ne": 0.86, "calibration": 1.0,
     "gauc": 0.7}]
RUN = {
    "python": "3.11.7", "memory_bytes": 24 * 2**30, "gpus": [], "git_commit": "0123456789abcdef", "num_workers": 2,
    "started": "2026-01-02T03:04:05+00:00",
    "data": {"num_users": 2469, "base_rate": 0.2, "requests": {"train": 800, "validation": 100, "test": 100},
             "oov_rate": {"item": {"train": 0.0, "test": 0.046}},
             "unseen_values": {"quantity": {"train": 0, "test": 7}}, "last_time": 1514779280, "description": "one year",
             "history_length_histogram": [[0, 0, 1], [1, 1, 20], [2, 63, 300], [64, 511, 40]]}}


def log_lines(num_steps=40):
    elapsed = 0.0
    for step in range(1, num_steps + 1):
        elapsed += 1.0
        yield {"split": "train", "step": step, "loss": 1 / step, "requests_per_s": 800.0, "candidates_per_s": 3e4,
               "elapsed_s": elapsed, "time_data_s": 0.1, "time_tower_s": 0.6}
        if step % 10 == 0:
            elapsed += 5.0
            yield {"split": "validation", "step": step, "auc": 0.5 + step / 200, "logloss": 0.5, "elapsed_s": elapsed}


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("name: first & last\ndata:\n  max_events: 200\n", encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines()))
    for name, content in (("plan", PLAN), ("results", RESULTS), ("run", RUN)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def read_page(directory):
    return Page(write_report(directory).read_text(encoding="utf-8"))


def test_a_whole_run_shows_every_figure(run_dir):
    page = read_page(run_dir)
    assert "first & last" in page.sections[""]
    assert "2026-01-02 03:04 UTC · 3 ranks · commit 0123456789" in page.sections[""]
    assert "test AUC 0.7500" in page.sections[""]
    assert "601,224 candidates, 2,177 users" in page.sections["results"]
    assert "<count> 0.7100 0.7000 0.4300" in page.sections["results"]
    assert "test: longer 0.7500" in page.sections["curves"]
    assert "800 requests/s, 30,000 candidates/s" in page.sections["speed"]
    assert "OOV rate: item 0.00% – 4.60%" in page.sections["data"]
    assert "Unseen values: quantity 0 – 7" in page.sections["data"]
    assert "2018-01-01 04:01 UTC" in page.sections["data"]
    assert "one year" in page.sections["data"]
    assert "newest 200 are used" in page.sections["data"]
    assert "item 4,096 16 row_wise fused 0, 1 256 KiB 16 KiB" in page.sections["plan"]
    assert "max_events" in page.sections["configuration"]
    assert "Memory 24 GiB" in page.sections["environment"]
    assert page.graphics == 5


def test_the_page_needs_nothing_but_itself(run_dir):
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert_self_contained(html)
    assert write_report(run_dir).read_text(encoding="utf-8") == html, "the same files make the same page"


def test_parts_of_a_step_and_the_rest_of_it_add_up_to_the_time_of_training_lines(run_dir):
    text = read_page(run_dir).sections["speed"]
    assert "1000.0 ms on average" in text
    assert "waiting for data 100.0 ms 10.0 %" in text
    assert "tower 600.0 ms 60.0 %" in text
    assert "other 300.0 ms 30.0 %" in text


def test_each_rank_holds_its_shards_and_an_idle_rank_is_shown(run_dir):
    text = read_page(run_dir).sections["plan"]
    user, item = 1000 * 9 * 4, 4096 * 17 * 4
    assert f"rank 0 rank 1 rank 2 {(user + item / 2) / 1024:.0f} KiB {item / 2 / 1024:.0f} KiB 0 B" in text


def test_a_replicated_table_counts_on_every_rank(run_dir):
    replica = {"world_size": 2, "tables": [table("item", 1024, 15, [], "data_parallel")]}
    (run_dir / "plan.json").write_text(json.dumps(replica))
    text = read_page(run_dir).sections["plan"]
    assert "128 KiB of weights and optimizer state on 2 ranks" in text
    assert text.count("64 KiB") == 2


@pytest.mark.parametrize(("name", "section", "words"), [
    ("config.yaml", "configuration", "No config.yaml"), ("run.json", "environment", "No run.json"),
    ("run.json", "data", "No run.json"), ("plan.json", "plan", "No plan.json"),
    ("results.json", "results", "No results.json yet"), ("metrics.jsonl", "curves", "No metrics.jsonl yet"),
    ("metrics.jsonl", "speed", "no training step was logged")])
def test_a_missing_file_costs_its_section_only(run_dir, name, section, words):
    whole = read_page(run_dir).sections
    (run_dir / name).unlink()
    sections = read_page(run_dir).sections
    assert words in sections[section]
    untouched = {"plan", "configuration"} - {section}
    assert all(sections[other] == whole[other] for other in untouched)


def test_one_step_and_nothing_else_is_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(next(log_lines())))
    page = read_page(tmp_path)
    assert "1.0 s" in page.sections[""]
    assert "No results.json yet" in page.sections["results"]


def test_infinite_and_nan_losses_are_left_out_of_the_curve(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 41, "loss": NaN}\n{"split": "train", "step": 42, "loss": Infinity}\n')
    assert "training" in read_page(run_dir).sections["curves"]


@pytest.mark.parametrize("line", ['{"split": "train", "step": 4', "{}", "[1]", '{"split": "train", "step": "4"}', ""])
def test_a_damaged_line_is_named_and_the_old_report_stays(run_dir, line):
    before = write_report(run_dir).read_bytes()
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[6] = line
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"metrics\.jsonl line 7 is damaged"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize(("name", "text"), [
    ("run.json", "{"), ("run.json", "[]"), ("results.json", "{}"), ("results.json", "[1]"), ("plan.json", "null,"),
    ("config.yaml", "a: [1"), ("config.yaml", "just words")])
def test_a_damaged_file_is_named(run_dir, name, text):
    (run_dir / name).write_text(text)
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(run_dir)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="none of a run's files"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_configuration_is_escaped_before_it_is_coloured():
    marked = highlight_yaml("name: <script>alert(1)</script>  # & more\n")
    assert "<script>" not in marked
    assert marked.startswith("<b>name</b>: &lt;script&gt;")
    assert "<i># &amp; more</i>" in marked


@pytest.mark.parametrize(("key", "value", "shown"), [
    ("memory_bytes", 3 * 2**30, "3 GiB"), ("prepare_s", 64.0, "1 min 4 s"), ("oov_rate", 0.0, "0.00%"),
    ("num_items", 68509, "68,509"), ("share", 0.25, "25.00%"), ("gpus", [], "none"), ("commit", None, "–"),
    ("mean", math.nan, "–"), ("exact", True, "yes"), ("rows", {"kept": 1200, "dropped": 3}, "kept 1,200, dropped 3")])
def test_facts_are_shown_in_the_unit_their_key_names(key, value, shown):
    assert fact(key, value) == shown


def test_titles_drop_units_and_spell_acronyms():
    assert [title(key) for key in ("num_oov_items", "memory_bytes", "gpus", "omp_num_threads")] == \
        ["OOV items", "Memory", "GPUs", "OMP num threads"]


def test_moving_mean_keeps_a_constant_and_lies_between_the_extremes():
    np.testing.assert_allclose(moving_mean(np.full(500, 3.0)), 3.0, rtol=1e-12)
    values = np.random.default_rng(0).normal(size=500)
    smoothed = moving_mean(values)
    assert smoothed.std() < 0.6 * values.std()
    assert values.min() <= smoothed.min() <= smoothed.max() <= values.max()
    np.testing.assert_array_equal(moving_mean(values[:10]), values[:10])
