"""Tokenizers of every kind, small ones made on the spot where no file is at hand."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from deployments.front.tokenizer import Tokenizer, open_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Serving a model means many small steps; each step makes one token for each request.",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Съешь ещё этих мягких французских булок, да выпей же чаю.",
    "いろはにほへと ちりぬるを 我が世誰ぞ 常ならむ",
    "0 1 2 3 4 5 6 7 8 9 10 2024 3.14159",
] * 3

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "It's 10:45; they'll pay $1,234.56 (or 99%) — won't they?",
    "tabs\tand\nnewlines\r\n\r\n  and   runs    of     spaces\n\n\n\n   7  8   9",
    "def f(x):\n    if x > 0:\n        return [x**2 for _ in range(10)]\n\treturn None  # done\n",
    "Größe, naïve café, Ångström; e\u0301 and n\u0303 combining",
    "Съешь же ещё этих мягких французских булок",
    "敏捷的棕色狐狸跳过懒狗。 すばしこい茶色の狐。 날쌘 갈색 여우",
    "نص عربي مع أرقام ١٢٣ و ۴۵۶؛ עברית",
    "हिन्दी देवनागरी ४५, ไทย ภาษาไทย, தமிழ்",
    "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 👍🏽 emoji",
    "\x00\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x9f\u200b\u200d\ufeff\u2028\u2029\u00a0nbsp",
    "½ ² Ⅷ ① ٣ 𝟙𝟚 numbers1and2letters3",
    "https://example.org/a_b-c?d=e&f=%20#g <html><b>&amp;</b>",
    "a" * 300 + " " * 300 + "1" * 50,
    "\ufffd\uffff\U0010ffff",
    "ſtrange ſ's long s, İstanbul, ǅ titlecase",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    path = Path(__file__).parents[4] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in models/")
    return path


@pytest.fixture(scope="session")
def llama_models() -> Path:
    """The folder of Meta's package, which ships the real tokenizers (and is their oracle)."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None or spec.origin is None:
        pytest.skip("llama-models is not installed (pip install --no-deps llama-models==0.3.0)")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-2-like model: BPE with byte fallback, a leading space, runs of spaces kept."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(file.getvalue())
    return path


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>"])
    return backend


def llama2_backend() -> tokenizers.Tokenizer:
    """As in Llama 2's own `tokenizer.json`."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    # The trainer takes byte tokens only as special ones; in Llama 2 they are ordinary.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def metaspace_backend() -> tokenizers.Tokenizer:
    backend = llama2_backend()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return backend


@pytest.fixture
def byte_level() -> tokenizers.Tokenizer:
    return byte_level_backend()


@pytest.fixture(scope="session", params=[byte_level_backend, llama2_backend, metaspace_backend])
def huggingface_backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return request.param()


@pytest.fixture(scope="session", params=["smollm2", "llama3", "llama4", "sentencepiece", "byte_level", "llama2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One tokenizer of every implementation."""
    name = request.param
    if name == "smollm2":
        return open_tokenizer(str(request.getfixturevalue("smollm2_path")))
    if name in ("llama3", "llama4"):
        return open_tokenizer(str(request.getfixturevalue("llama_models") / name / "tokenizer.model"))
    if name == "sentencepiece":
        return open_tokenizer(str(request.getfixturevalue("sentencepiece_model")))
    path = tmp_path_factory.mktemp(name) / "tokenizer.json"
    (byte_level_backend() if name == "byte_level" else llama2_backend()).save(str(path))
    return open_tokenizer(str(path))
