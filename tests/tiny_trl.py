"""Tiny models, a tokenizer, data and trainers for TRL, all made here. TRL is imported when a trainer is made."""

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topk_rkl.trainers import trl

SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
VOCAB = len(SPECIAL) + 256
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PROMPTS = ["2 + 2", "a cat", "the sky is", "hello", "yes or", "one", "blue and", "why"]
DIALOGS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": prompt[i % 3 :] * (1 + i % 2)}]
    for i, prompt in enumerate(PROMPTS)
]
T = 0.7
# What a trainer's configuration says beside COMMON.
CASES: dict[str, dict[str, Any]] = {
    "Distillation": {"top_p": 0.9},
    "GKD": {"lmbda": 1.0, "beta": 1.0},
    "GOLD": {"lmbda": 1.0, "beta": 1.0, "top_p": 0.9},
    "IWOPD": {"distillation_objective": "jsd", "top_p": 0.9},
    "SDPO": {"num_generations": 2, "distillation_mode": "topk_logits", "top_p": 0.9},
    "ServerDistillation": {"beta": 0.0, "teacher_model_server_url": "http://localhost", "top_p": 0.9},
}
COMMON = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1,
    "learning_rate": 0.01, "max_grad_norm": 0.0, "temperature": T, "max_new_tokens": 10, "max_completion_length": 10,
    "max_length": 64, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip


class Tiny(NamedTuple):
    """Where the models are, under the names that the page gives them."""

    folder: Path

    @property
    def student(self) -> str:
        return str(self.folder / "Qwen/Qwen3-0.6B")

    @property
    def teacher(self) -> str:
        return str(self.folder / "Qwen/Qwen3-4B")


def saved(folder: Path) -> Tiny:
    tiny = Tiny(folder)
    save(tiny.student, 0, layers=1)
    save(tiny.teacher, 1, layers=2)
    return tiny


def save(folder: str, seed: int, layers: int) -> None:
    """A random Llama and the tokenizer. Its logits are spread enough that divergences are not all but 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def tokenizer() -> Any:
    """A byte is a token, as GOLD wants them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        model_max_length=128, additional_special_tokens=list(SPECIAL[3:]),
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def server(teacher: str) -> type:
    """TRL's client of a server with the teacher of that folder, which answers by itself, through TRL's own parser."""
    from trl.generation.vllm_client import VLLMClient

    class Client(VLLMClient):
        def __init__(self, **_: Any) -> None:
            self.model = load(teacher).eval()

        @torch.no_grad()
        def get_sequence_logprobs(
            self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float
        ) -> dict[str, list]:
            answers = []
            for ids, start in zip(sequences, prompt_lengths, strict=True):
                log_probs = (self.model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)  # (T, V)
                rows: list[dict | None] = [None]  # nothing predicts the first
                for row, token in zip(log_probs, ids[1:], strict=False):
                    best = {int(i): rank + 1 for rank, i in enumerate(row.topk(top_logprobs).indices)}
                    best.setdefault(token, int((row > row[token]).sum()) + 1)  # the actual one always comes
                    rows.append({str(i): {"logprob": float(row[i]), "rank": rank} for i, rank in best.items()})
                answers.append(self._format_sequence_logprobs({"prompt_logprobs": rows}, ids, start, top_logprobs))
            return {key: [answer[key] for answer in answers] for key in answers[0]}

    return Client


def trainer(tiny: Tiny, name: str, *, stock: bool = False, settings: dict | None = None, **options: Any) -> Any:
    """A trainer of this name, ours or TRL's own; `settings` are of its configuration."""
    from datasets import Dataset

    _, module, base = trl.TRAINERS[f"TopK{name}Trainer"]
    home = "trl" if name == "Distillation" else module
    config = getattr(import_module(home), base.replace("Trainer", "Config"))
    known = {key: value for key, value in COMMON.items() if key in config.__dataclass_fields__}
    args = config(str(tiny.folder / "out"), **{**known, **CASES[name], **(settings or {})})
    rows: dict[str, list] = {"prompt": PROMPTS}
    if name in ("GKD", "GOLD", "IWOPD"):
        rows = {"messages": DIALOGS}
    if name == "SDPO":
        rows = {"prompt": [dialog[:1] for dialog in DIALOGS], "privileged_context": ["it is so"] * 8}
        options["reward_funcs"] = lambda completions, **_: [float(i % 2) for i in range(len(completions))]
    elif name != "ServerDistillation":
        options = {"teacher_model": load(tiny.teacher), **options}
    kind = getattr(import_module(home), base) if stock else getattr(trl, f"TopK{name}Trainer")
    dataset = Dataset.from_dict(rows)
    return kind(
        model=load(tiny.student), args=args, train_dataset=dataset, processing_class=tokenizer(), **options
    )  # fmt: skip


def trained(trainer: Any) -> tuple[list[dict], list[dict], dict[str, Tensor]]:
    """Its logs, the batches of its first optimizer step with what TRL divides by, and the gradients of that step."""
    from transformers import TrainerCallback

    batches: list[dict] = []
    grads: dict[str, Tensor] = {}
    compute_loss = trainer.compute_loss

    def watched(model: Any, inputs: dict, *args: Any, **options: Any) -> Any:
        batches.append({**inputs, "items": options.get("num_items_in_batch")})
        return compute_loss(model, inputs, *args, **options)

    class First(TrainerCallback):
        def on_pre_optimizer_step(self, _: Any, state: Any, *__: Any, model: Any, **___: Any) -> None:
            if state.global_step == 0:
                grads.update({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})

    trainer.compute_loss = watched
    trainer.add_callback(First())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, batches[: trainer.args.gradient_accumulation_steps], grads


def steps_of_one_batch(tiny: Tiny, name: str, size: int, times: int, **options: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of four sequences that no chance decides: the dataset's, or of the best token each time."""
    settings = {"top_k": 1} if name == "Distillation" else {"lmbda": 0.0}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 1}
    logs, _, grads = trained(trainer(tiny, name, settings={**settings, **sizes}, **options))
    return logs[0]["loss"], grads


if __name__ == "__main__":  # on each of two ranks, under torchrun
    import json
    import os
    import sys

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    outcomes = {}
    for name in sys.argv[2:]:
        value, gradients = steps_of_one_batch(Tiny(folder), name, 2, 1, k=8)
        outcomes[name] = value, {key.removeprefix("module."): x.tolist() for key, x in gradients.items()}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(outcomes))
    os._exit(0)  # a thread of gloo may let go of a tensor while Python ends, which would abort the process
