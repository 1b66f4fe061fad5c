"""What is used of TRL's inside: each private thing by name, so that another version of TRL is judged here."""

import inspect
from pathlib import Path

import pytest
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

import alignpro
from alignpro.errors import AlignProError
from alignpro.llm.training.ppo import PPOConfig
from alignpro.llm.training.trl_adapter import PRIVATE

ATTRIBUTES = (
    *("_metrics", "_step", "_buffered_inputs", "_last_loaded_step", "vllm_generation", "num_generations"),
    *("num_generations_eval", "num_iterations", "reward_weights", "ref_model", "use_vllm"),
)


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize("method", PRIVATE)
def test_every_private_method_is_there_with_its_parameters(trainer, method):
    parameters = list(inspect.signature(getattr(trainer, method)).parameters)[1:]
    wanted = PRIVATE[method]
    assert tuple(parameters[: len(wanted)]) == wanted


@pytest.mark.parametrize("module", [grpo_trainer, rloo_trainer])
def test_every_private_attribute_is_there(module):
    source = inspect.getsource(module)
    for name in ATTRIBUTES:
        assert f"self.{name}" in source, name


def test_what_is_kept_of_a_round_has_the_names_that_are_read():
    for module, names in (
        (grpo_trainer, ("old_per_token_logps", "ref_per_token_logps", "num_items_in_batch")),
        (rloo_trainer, ("old_logps",)),
    ):
        source = inspect.getsource(module)
        assert all(f'"{name}"' in source for name in names)


def test_nothing_private_of_trl_is_used_elsewhere():
    """But for the adapter: no other file names one of its methods."""
    folder = Path(alignpro.__file__).parent
    for path in folder.rglob("*.py"):
        if path.name in ("trl_adapter.py", "checkpoints.py"):  # whole checkpoints, in all trainings
            continue
        text = path.read_text()
        assert not [name for name in PRIVATE if f".{name}" in text or f"def {name}" in text], path


def config(tmp_path, **values):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "steps_per_generation": 1}
    return PPOConfig(**common, gradient_accumulation_steps=1, **values)


def test_one_rewrite_of_each_prompt_is_enough(tmp_path):
    """PPO compares no rewrites of one prompt; TRL's own configuration insists on two."""
    made = config(tmp_path, num_generations=1, per_device_train_batch_size=3)
    assert (made.num_generations, made.generation_batch_size) == (1, 3)
    with pytest.raises(AlignProError, match=r"^prompts x samples = 1: .*; give at least 2"):
        config(tmp_path, num_generations=1, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="divisible"):  # what TRL checks for groups is checked still
        config(tmp_path, num_generations=2, per_device_train_batch_size=3)
