"""The built-in corpus: complete, disjoint, cached, and made up where a source is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from etr.data import Corpus, builtin, builtin_corpus
from etr.data.split import MAX_SHARED, shingles
from etr.data.synthetic import synthesise

SIZE = 120_000
DOMAINS = ["python", "cpp", "docs", "math", "arithmetic", "english"]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache_dir: Path) -> Corpus:
    return builtin_corpus(cache_dir, SIZE)


def test_six_balanced_domains(corpus: Corpus) -> None:
    assert [domain.name for domain in corpus.domains] == DOMAINS
    for domain in corpus.domains:
        size = sum(len(text.encode()) for text in domain.train + domain.held_out)
        assert 0.4 * SIZE <= size <= SIZE
        held_bytes = sum(len(text.encode()) for text in domain.held_out)
        assert 0.04 < held_bytes / size < 0.25


def test_held_out_is_unlike_training(corpus: Corpus) -> None:
    trained = [text for domain in corpus.domains for text in domain.train]
    seen = {h for text in trained for h in shingles(text).tolist()}
    for domain in corpus.domains:
        for text in domain.held_out:
            own = shingles(text).tolist()
            assert sum(h in seen for h in own) <= MAX_SHARED * len(own)


def test_no_path_of_this_machine(corpus: Corpus) -> None:
    everything = "".join(
        [*corpus.notes, *(t for d in corpus.domains for t in d.train + d.held_out)]
    )
    assert str(Path(builtin.__file__).parent) not in everything


def test_cache_gives_the_same(corpus: Corpus, cache_dir: Path, tmp_path: Path) -> None:
    assert len(list(cache_dir.iterdir())) == 1
    assert builtin_corpus(cache_dir, SIZE) == corpus
    assert builtin_corpus(tmp_path, SIZE) == corpus


def test_cache_is_read(corpus: Corpus, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_collect", None)
    assert builtin_corpus(cache_dir, SIZE).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_cache_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    _without_sources(monkeypatch, DOMAINS)
    before = builtin_corpus(tmp_path, 10_000)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    altered = content[:-200] + bytes([content[-200] ^ 1]) + content[-199:]
    path.write_bytes({"truncated": content[:-9], "altered": altered, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="damaged"):
        assert builtin_corpus(tmp_path, 10_000) == before
    assert path.read_bytes() == content


def test_missing_source_is_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_sources(monkeypatch, DOMAINS)
    corpus = builtin_corpus(tmp_path, 50_000)
    assert [domain.name for domain in corpus.domains] == DOMAINS
    assert all(domain.held_out for domain in corpus.domains)
    made_up = [note for note in corpus.notes if "made up" in note]
    assert [note.partition(":")[0] for note in made_up] == DOMAINS


def test_unreadable_sources_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_sources(monkeypatch, DOMAINS)
    (tmp_path / "latin.py").write_bytes(b"caf\xe9")
    (tmp_path / "broken.py").write_text('"""x" def')
    (tmp_path / "lone.py").write_text('"""' + "\\ud800 word " * 40 + '"""')
    found = [(path.name, path) for path in tmp_path.glob("*.py")]
    source = dataclasses.replace(builtin.SOURCES["docs"], find=lambda: found)
    monkeypatch.setitem(builtin.SOURCES, "docs", source)
    docs = next(d for d in builtin_corpus(tmp_path / "c", 50_000).domains if d.name == "docs")
    assert any(text.startswith(" word  word") for text in docs.train + docs.held_out)


def test_size_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes_per_domain must be at least 10000, got 5"):
        builtin_corpus(tmp_path, 5)


@pytest.mark.parametrize("domain", DOMAINS)
def test_synthesis_is_seeded(domain: str) -> None:
    texts = synthesise(domain, 20_000)
    assert texts == synthesise(domain, 20_000)
    assert texts != synthesise(domain, 20_000, seed=1)
    assert 20_000 <= sum(map(len, texts)) < 30_000
    assert len(set(texts)) == len(texts)


def _without_sources(monkeypatch: pytest.MonkeyPatch, domains: list[str]) -> None:
    for name in domains:
        source = dataclasses.replace(builtin.SOURCES[name], find=list)
        monkeypatch.setitem(builtin.SOURCES, name, source)
