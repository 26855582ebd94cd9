"""Trains the small BLOOM model of tests/fixtures/tiny-bloom-trained, tokenizer included: some 12 minutes on 2 idle cores.

    python -m benchmarks.train_bloom belle_eval_700.jsonl belle_zh_seed_tasks.jsonl

The files are eval/eval_set.json and data/1.5M/zh_seed_tasks.json of https://github.com/LianjiaTech/BELLE, a JSON object a
line. With `--minutes 4` it stops after 4 minutes; the same command goes on where it stopped, to the same weights.

    python -m benchmarks.train_bloom belle_eval_700.jsonl belle_zh_seed_tasks.jsonl --steps 300 \\
        --distill tests/fixtures/tiny-bloom-trained --layers 2 --hidden 96 --work build/distill --out build/tiny-bloom-student

trains a smaller model of the same vocabulary, to guess tokens for that one: it learns the teacher's probabilities of the next
token (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at a temperature of 1), on the same text.

INT8 can only be judged on a model that has something to say: one with random weights spreads its probability so evenly
that any rounding changes which token is likeliest.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM

from benchmarks import machine
from benchmarks.bloom_text import Split, chinese, english

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # ids 0 to 3, as in BLOOM
WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # as BLOOM's tokenizer splits
MODEL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 192, "n_layer": 5, "n_head": 6, "layer_norm_epsilon": 1e-5, "seq_length": 2048,
    "tie_word_embeddings": True, "apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
SEED = 0
SEQUENCE = 256
BATCH = 8
STEPS = 2500
WARMUP = 100
LEARNING_RATE = 3e-3
CHINESE = 0.3  # of the sequences of a batch; there is less of it than of English
SAVE_EVERY = 50
TOPIC_CHARACTERS = 4000  # of a topic in heldout-en.txt

Streams = Mapping[str, torch.Tensor]  # language -> token ids of all its documents, one after the other


def make_tokenizer(splits: Mapping[str, Split]) -> Tokenizer:
    """BPE over bytes, as BLOOM's; Chinese counts as often as it is trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lengths = {language: sum(map(len, part.train.values())) for language, part in splits.items()}
    repeats = {"english": 1, "chinese": max(1, round(CHINESE / (1 - CHINESE) * lengths["english"] / lengths["chinese"] / 2))}
    texts = [text for language, part in splits.items() for text in [*part.train.values()] * repeats[language]]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Mapping[str, str]) -> torch.Tensor:
    """Token ids of the documents, each closed by </s>."""
    encoded = tokenizer.encode_batch(list(documents.values()))
    return torch.tensor([token for one in encoded for token in (*one.ids, MODEL["eos_token_id"])])


@dataclass(frozen=True)
class Plan:
    """What is trained: the shape of the model, for how many steps, and by which teacher, if not by the text alone."""

    model: Mapping[str, Any]
    steps: int
    teacher: Any = None

    @classmethod
    def student(cls, checkpoint: Path, layers: int, hidden: int, steps: int) -> Plan:
        """A smaller model with the vocabulary and the heads' size of its teacher."""
        teacher = BloomForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().requires_grad_(False)
        head = teacher.config.hidden_size // teacher.config.n_head
        if hidden % head:
            raise SystemExit(f"--hidden {hidden} is not a multiple of {head}, the size of the teacher's heads.")
        shape = {"vocab_size": teacher.config.vocab_size, "hidden_size": hidden, "n_layer": layers, "n_head": hidden // head}
        return cls({**MODEL, **shape}, steps, teacher)


def make_model(shape: Mapping[str, Any]) -> Any:
    """An untrained model; output projections start small, as in GPT-2, since all of them are added up."""
    torch.manual_seed(SEED)
    model = BloomForCausalLM(BloomConfig(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight")):
                parameter.mul_(1 / math.sqrt(2 * shape["n_layer"]))
    return model


def make_optimizer(model: Any) -> torch.optim.AdamW:
    """AdamW that lets only matrices decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int) -> float:
    """Up for `WARMUP` steps, then down to a hundredth along a cosine."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / (steps - WARMUP)
    return LEARNING_RATE * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def batch_of(step: int, streams: Streams) -> torch.Tensor:
    """[BATCH, SEQUENCE + 1] token ids for one step; they depend on nothing but the step."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    rows = []
    for draw in torch.rand(BATCH, generator=generator).tolist():
        stream = streams["chinese" if draw < CHINESE else "english"]
        start = int(torch.randint(len(stream) - SEQUENCE, (1,), generator=generator))
        rows.append(stream[start : start + SEQUENCE + 1])
    return torch.stack(rows)


def logits_of(model: Any, ids: torch.Tensor, fast: bool) -> torch.Tensor:
    """Logits [tokens, vocabulary] after all tokens but the last of each row."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):  # 1.6 times as fast where a CPU has bfloat16
        return model(ids[:, :-1], use_cache=False).logits.float().flatten(0, 1)  # type: ignore[no-any-return]


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood of all tokens but the first of each row."""
    return torch.nn.functional.cross_entropy(logits_of(model, ids, model.training), ids[:, 1:].flatten())


def divergence_of(model: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence of the teacher's distributions of the next token from the model's."""
    with torch.no_grad():
        expected = logits_of(teacher, ids, model.training).log_softmax(-1)
    found = logits_of(model, ids, model.training).log_softmax(-1)
    return torch.nn.functional.kl_div(found, expected, reduction="batchmean", log_target=True)


@dataclass
class Run:
    """Training as far as it has come; kept in a file."""

    model: Any
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # of the batches, averaged over the last 50 or so

    def save(self, file: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "seconds": self.seconds, "loss": self.loss}
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(file)

    @classmethod
    def resume(cls, file: Path, shape: Mapping[str, Any]) -> Run:
        model = make_model(shape)
        run = cls(model, make_optimizer(model))
        if file.exists():
            state = torch.load(file)
            model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            run.step, run.seconds, run.loss = state["step"], state["seconds"], state["loss"]
        return run


def train(run: Run, plan: Plan, streams: Streams, file: Path, minutes: float) -> None:
    """Train to the last step, or for so many minutes."""
    run.model.train()
    started = saved = time.perf_counter()
    while run.step < plan.steps and saved - started < 60 * minutes:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, plan.steps)
        ids = batch_of(run.step, streams)
        loss = divergence_of(run.model, plan.teacher, ids) if plan.teacher else loss_of(run.model, ids)
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.step += 1
        run.loss += (loss.item() - run.loss) * max(0.02, 1 / run.step)
        if run.step % SAVE_EVERY == 0 or run.step == plan.steps:
            now = time.perf_counter()
            run.seconds += now - saved
            saved = now
            run.save(file)
            print(f"step {run.step} of {plan.steps}: loss {run.loss:.3f}, {run.seconds:.0f} s", flush=True)


@torch.inference_mode()
def held_out_figures(model: Any, train_ids: torch.Tensor, ids: torch.Tensor, teacher: Any) -> dict[str, float]:
    """Perplexity on text the model has not seen, beside that of how often each token occurs in the text it has; and how far the
    model agrees with its teacher, if it had one."""
    model.eval()
    windows = ids[: (len(ids) - 1) // SEQUENCE * SEQUENCE + 1].unfold(0, SEQUENCE + 1, SEQUENCE)
    loss = sum(loss_of(model, window[None]).item() for window in windows) / len(windows)
    counts = torch.bincount(train_ids, minlength=MODEL["vocab_size"]).double() + 1
    unigram = -(counts / counts.sum()).log()[windows[:, 1:]].mean().item()
    return {
        "tokens": windows[:, 1:].numel(),
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "unigram_perplexity": round(math.exp(unigram), 1),
        **(_agreement(model, teacher, windows) if teacher else {}),
    }


def _agreement(model: Any, teacher: Any, windows: torch.Tensor) -> dict[str, float]:
    same = divergence = 0.0
    for window in windows:
        found, expected = (logits_of(each, window[None], False) for each in (model, teacher))
        same += (found.argmax(-1) == expected.argmax(-1)).double().mean().item()
        divergence += divergence_of(model, teacher, window[None]).item()
    return {"top1_of_teacher": round(same / len(windows), 4), "kl_of_teacher": round(divergence / len(windows), 4)}


def write_checkpoint(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """A Hugging Face directory with float16 weights."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {**SPECIAL, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def excerpts(held_out: Mapping[str, str]) -> str:
    """The first paragraphs of the documentation's topics that are held out."""
    texts = []
    for name, text in held_out.items():
        if name.startswith("topic "):
            end = text.find("\n\n", TOPIC_CHARACTERS)
            texts.append(text if end < 0 else text[:end])
    return "\n\n\n".join(texts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="Chinese: BELLE's eval set and seed tasks, a JSON object a line")
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/tiny-bloom-trained"))
    parser.add_argument("--work", type=Path, default=Path("build/train-bloom"), help="where training is kept as far as it is")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--distill", type=Path, metavar="CHECKPOINT", help="train a smaller model that this one teaches")
    parser.add_argument("--layers", type=int, default=2, help="of the smaller model")
    parser.add_argument("--hidden", type=int, default=96, help="of the smaller model")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; run again to go on")
    arguments = parser.parse_args()

    splits = {"english": english(), "chinese": chinese(arguments.records)}
    arguments.work.mkdir(parents=True, exist_ok=True)
    plan, vocabulary = Plan(MODEL, arguments.steps), arguments.work / "tokenizer.json"
    if arguments.distill:
        plan = Plan.student(arguments.distill, arguments.layers, arguments.hidden, arguments.steps)
        vocabulary = arguments.distill / "tokenizer.json"
    if not vocabulary.exists():
        make_tokenizer(splits).save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    streams = {language: encode(tokenizer, part.train) for language, part in splits.items()}
    state = arguments.work / "state.pt"
    run = Run.resume(state, plan.model)
    print({language: len(ids) for language, ids in streams.items()}, "tokens;", run.model.num_parameters(), "parameters")
    train(run, plan, streams, state, arguments.minutes)
    held_out = {language: encode(tokenizer, part.held_out) for language, part in splits.items()}

    def figures_of(model: Any, language: str, ids: torch.Tensor) -> dict[str, float]:
        return held_out_figures(model, streams[language], ids, plan.teacher)

    if run.step < plan.steps:
        print({language: figures_of(run.model, language, ids) for language, ids in held_out.items()})
        print("not finished: run the same command again")
        return

    write_checkpoint(run.model, tokenizer, arguments.out)
    if not plan.teacher:
        (arguments.out / "heldout-en.txt").write_text(excerpts(splits["english"].held_out), encoding="utf-8")
    model = BloomForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)  # as it was written
    report = {
        "parameters": model.num_parameters(),
        "training": {
            "tokens": {language: len(ids) for language, ids in streams.items()},
            "steps": plan.steps, "tokens_a_step": BATCH * SEQUENCE, "seconds": round(run.seconds),
            "last_loss": round(run.loss, 4),
        },
        "held_out": {language: figures_of(model, language, ids) for language, ids in held_out.items()},
        "machine": machine.describe(),
    }  # fmt: skip
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
