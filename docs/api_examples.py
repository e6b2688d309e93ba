"""An example per public name, each in a cell of its name. `python -m docs.api` prints the cells in docs/api.md."""

# %% set-up
import torch

from topk_rkl.diagnostics import linear_topk_diagnostics, topk_diagnostics
from topk_rkl.extraction import extract
from topk_rkl.loss import (
    AlphaBeta,
    Divergence,
    ForwardKL,
    Group,
    JensenShannon,
    LinearTopKDivergenceLoss,
    LinearTopKReverseKLLoss,
    Mass,
    Mixture,
    Reduction,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Support,
    TopKDivergenceLoss,
    TopKReverseKLLoss,
    WeightGrad,
    causal_topk_reverse_kl,
    generalized_jsd,
    global_count,
    linear_causal_topk_reverse_kl,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)
from topk_rkl.plot import TokenReport, save_html, save_png, token_report
from topk_rkl.recipe.builders import (
    difference,
    fixed_ids,
    intersection,
    linear_fixed_ids,
    remap,
    student_topk,
    teacher_top_p,
    union,
    with_sampled,
)
from topk_rkl.recipe.composition import extrapolation, mixture, residual, taid, veto
from topk_rkl.recipe.rewards import (
    box_cox,
    contrast,
    extrapolated_log_ratio,
    k1,
    k2,
    k3,
    log_ratio,
    power_difference,
    probability_difference,
    return_to_go,
    tanh_log_ratio,
)
from topk_rkl.recipe.rollout import sample_top_p, sampled_token_loss, top_p_filter
from topk_rkl.recipe.weighting import Mode, Occurrences, aggregate, special_token_mask
from topk_rkl.servers import (
    alignment,
    from_llama_cpp,
    from_openai,
    from_sglang,
    from_tinker,
    from_trtllm,
    from_vllm,
    from_vllm_scores,
)
from topk_rkl.servers.client import VLLM, ScoringError, Server, SGLang
from topk_rkl.store import Collator, Header, Row, Store, StoreDataset, Writer
from topk_rkl.store.readers import axolotl, distillkit, megatron
from topk_rkl.tokenizers import TokenizerReport, Verdict, Vocabulary, check_tokenizers, tokenizer_hash
from topk_rkl.trainers.head_loss import HeadLoss, HeadTopK, within_head
from topk_rkl.trainers.heads import Head, head_of

B, T, V, H, K = 2, 8, 100, 16, 4
student = torch.randn(B, T, V, requires_grad=True)  # logits
teacher, other_teacher, base = (torch.randn(B, T, V) for _ in range(3))  # logits
hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
teacher_hidden, teacher_weight = torch.randn(B, T, H), torch.randn(V, H)
sampled = torch.randint(V, (B, T))  # ids of the response
mask = torch.ones(B, T)  # 0 at prompt and padding
log_p = student.log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)  # of the sampled tokens
log_q = teacher.log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)
log_b = base.log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)
support = teacher_topk(teacher, K)  # ids (B, T, K), log_probs (B, T, K)

# %% teacher_topk
support = teacher_topk(teacher, K)
assert support.ids.shape == support.log_probs.shape == (B, T, K)

# %% topk_reverse_kl
loss = topk_reverse_kl(student, teacher, k=K, weights=mask)
loss.backward()
assert student.grad.count_nonzero() <= B * T * K

# %% causal_topk_reverse_kl
labels = sampled.masked_fill(mask == 0, -100)  # (B, T) of the same tokens as the input ids, not shifted
loss = causal_topk_reverse_kl(student, teacher, labels, k=K)
assert torch.allclose(loss, topk_reverse_kl(student[:, :-1], teacher[:, :-1], k=K, weights=mask[:, 1:]))

# %% topk_divergence
loss = topk_divergence(student, teacher, divergence=JensenShannon(0.5), mass="tail", k=K, weights=mask)

# %% linear_teacher_topk
support = linear_teacher_topk(teacher_hidden, teacher_weight, K)

# %% linear_topk_reverse_kl
loss = linear_topk_reverse_kl(hidden, weight, support, weights=mask)
loss.backward()
assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape

# %% linear_topk_divergence
loss = linear_topk_divergence(hidden, weight, support, divergence=ForwardKL(), weights=mask)

# %% linear_causal_topk_reverse_kl
labels = sampled.masked_fill(mask == 0, -100)
loss = linear_causal_topk_reverse_kl(hidden, weight, support, labels, num_items_in_batch=2 * B * T)

# %% TopKReverseKLLoss
criterion = TopKReverseKLLoss(K, temperature=2.0)
loss = criterion(student, teacher, weights=mask)

# %% TopKDivergenceLoss
criterion = TopKDivergenceLoss(K, divergence=SkewForwardKL(0.1))
loss = criterion(student, teacher, weights=mask)

# %% LinearTopKReverseKLLoss
criterion = LinearTopKReverseKLLoss(logit_scale=0.0625)
loss = criterion(hidden, weight, support, weights=mask)

# %% LinearTopKDivergenceLoss
criterion = LinearTopKDivergenceLoss(divergence=Mixture(0.5), softcap=30.0)
loss = criterion(hidden, weight, support, weights=mask)

# %% Support
received = Support(ids=torch.tensor([[5, 9, 9]]), log_probs=torch.tensor([[-0.1, -2.5, -2.5]]))  # from a server
assert received.unique().ids.tolist() == [[5, 9, -1]]

# %% ReverseKL
loss = topk_divergence(student, teacher, divergence=ReverseKL(clamp=(-5.0, 5.0)), k=K)

# %% ForwardKL
loss = topk_divergence(student, teacher, divergence=ForwardKL(), k=K)

# %% JensenShannon
loss = topk_divergence(student, teacher, divergence=JensenShannon(beta=0.3), k=K)

# %% Mixture
loss = topk_divergence(student, teacher, divergence=Mixture(lam=0.7), k=K)

# %% SkewReverseKL
loss = topk_divergence(student, teacher, divergence=SkewReverseKL(lam=0.1), k=K)

# %% SkewForwardKL
loss = topk_divergence(student, teacher, divergence=SkewForwardKL(lam=0.1), k=K)

# %% AlphaBeta
loss = topk_divergence(student, teacher, divergence=AlphaBeta(alpha=0.2, beta=0.7), k=K)

# %% generalized_jsd
assert generalized_jsd(0.0) == ForwardKL() and generalized_jsd(1.0) == ReverseKL()

# %% global_count
denominator = global_count([mask[:1], mask[1:]])  # of two micro-batches, and of all ranks where there are more
parts = [
    topk_reverse_kl(student[i], teacher[i], k=K, weights=mask[i], denominator=denominator)
    for i in (slice(1), slice(1, B))
]
assert torch.isclose(sum(parts), topk_reverse_kl(student, teacher, k=K, weights=mask))

# %% Divergence
divergences: dict[str, Divergence] = {"reverse": ReverseKL(), "forward": ForwardKL()}

# %% Mass
mass: Mass = "tail"

# %% Reduction
reduction: Reduction = "none"
assert topk_reverse_kl(student, teacher, k=K, reduction=reduction).shape == (B, T)

# %% Group
ranks: Group | None = None  # a ProcessGroup, or mesh["tp"]: the logits are then shards of the vocabulary
loss = topk_reverse_kl(student, teacher, k=K, weights=mask, group=ranks)

# %% WeightGrad
layout: WeightGrad = "sparse"
loss = linear_topk_reverse_kl(hidden, weight, support, weight_grad=layout)

# %% use_backend
with use_backend("reference"):
    loss = topk_reverse_kl(student, teacher, k=K)

# %% topk_diagnostics
found = topk_diagnostics(student, teacher, ["student_mass", "overlap_count"], k=K)
assert found["student_mass"].shape == (B, T)

# %% linear_topk_diagnostics
found = linear_topk_diagnostics(hidden, weight, support, ["student_entropy"])

# %% student_topk
support = student_topk(student, teacher, K)

# %% teacher_top_p
support = teacher_top_p(teacher, 0.8, K)

# %% fixed_ids
support = fixed_ids(teacher, [3, 5, 8])
assert support.ids.shape == (B, T, 3)

# %% linear_fixed_ids
support = linear_fixed_ids(teacher_hidden, teacher_weight, [3, 5, 8], normalize=True)

# %% with_sampled
support = with_sampled(teacher_topk(teacher, K), sampled, teacher)
assert support.ids.shape == (B, T, K + 1)

# %% union
support = union(teacher_topk(teacher, K), student_topk(student, teacher, K))

# %% intersection
support = intersection(teacher_topk(teacher, K), student_topk(student, teacher, K))

# %% difference
support = difference(teacher_topk(teacher, K), student_topk(student, teacher, K))

# %% remap
support = remap(teacher_topk(teacher, K), {3: 7}, student_vocab=V)

# %% mixture
support = mixture([teacher, other_teacher], [0.7, 0.3], k=K)

# %% residual
support = residual(teacher, other_teacher, lam=1.0, clip=5.0, k=K)

# %% extrapolation
support = extrapolation(teacher, base, lam=1.25, k=K)

# %% taid
support = taid(student, teacher, t=0.4, k=K)

# %% veto
support = veto(student, teacher, beta=0.5, k=K)

# %% log_ratio
reward = log_ratio(log_p, log_q, clip=(-5.0, 5.0))
assert reward.shape == (B, T) and not reward.requires_grad

# %% tanh_log_ratio
reward = tanh_log_ratio(log_p, log_q, tau=1.0)

# %% power_difference
reward = power_difference(log_p, log_q, alpha=5.0)

# %% box_cox
reward = box_cox(log_p, log_q, alpha=0.5)

# %% probability_difference
reward = probability_difference(log_p, log_q)

# %% extrapolated_log_ratio
reward = extrapolated_log_ratio(log_p, log_q, log_b, lam=1.25)

# %% contrast
reward = contrast(log_q, [log_b])

# %% return_to_go
returns = return_to_go(log_ratio(log_p, log_q), mask, gamma=0.99)

# %% k1
estimate = k1(log_p, log_q).mean()

# %% k2
estimate = k2(log_p, log_q).mean()

# %% k3
estimate = k3(log_p, log_q).mean()
assert estimate >= 0

# %% top_p_filter
filtered = top_p_filter(teacher, 0.9)

# %% sample_top_p
ids = sample_top_p(student, 0.9, generator=torch.Generator().manual_seed(0))
assert ids.shape == (B, T)

# %% sampled_token_loss
loss = sampled_token_loss(student, teacher, sampled, weights=mask)
loss.backward()

# %% aggregate
per_token = topk_reverse_kl(student, teacher, k=K, weights=mask, reduction="none")
loss = aggregate(per_token, mask, "seq-mean-token-mean")

# %% special_token_mask
weights = special_token_mask(sampled, [3, 7], "first")
loss = topk_reverse_kl(student, teacher, k=K, weights=weights)

# %% Mode
modes: list[Mode] = ["token-mean", "seq-mean-token-sum"]
losses = [aggregate(torch.ones(B, T), mask, mode) for mode in modes]
assert losses[0] == 1 and losses[1] == T

# %% Occurrences
which: Occurrences = "all"
weights = special_token_mask(sampled, [3, 7], which)

# %% head_of
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=H, num_attention_heads=2, num_hidden_layers=1))
head = head_of(model)
loss = linear_topk_reverse_kl(hidden, teacher=support, weights=mask, **head.student)

# %% Head
head = Head(torch.nn.Linear(H, V), softcap=30.0)
support = linear_teacher_topk(teacher_hidden, k=K, **head.teacher)

# %% HeadLoss
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=H, num_attention_heads=2, num_hidden_layers=1))
head_loss = HeadLoss(model, temperature=0.7)
loss = head_loss(support, labels=sampled, input_ids=sampled)
loss.backward()

# %% HeadTopK
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=H, num_attention_heads=2, num_hidden_layers=1))
support = HeadTopK(model, K)(input_ids=sampled)
assert support.ids.shape == (B, T, K)

# %% within_head
head = torch.nn.Linear(H, V)
with within_head(head, lambda x: linear_topk_reverse_kl(x, head.weight, support, student_bias=head.bias)) as taken:
    head(hidden)  # as the model that holds the head runs it
loss = taken[0]

# %% extract
import tempfile

from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=H, num_attention_heads=2, num_hidden_layers=1))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"yes": 0, "no": 1})))
rows = [{"input_ids": ids} for ids in sampled.tolist()]
with tempfile.TemporaryDirectory() as folder:
    store = extract(model, tokenizer, rows, folder, K)
    assert len(store) == B and store[0].support.ids.shape == (T, K)

# %% check_tokenizers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

student_tokenizer = Tokenizer(WordLevel({"yes": 0, "no": 1, "maybe": 2}))
teacher_tokenizer = Tokenizer(WordLevel({"no": 0, "yes": 1, "never": 2}))
report = check_tokenizers(student_tokenizer, teacher_tokenizer, student_vocab=V, teacher_vocab=V, probe=["yes", "no"])
assert report.verdict == "remap" and report.mapping == {0: 1, 1: 0, 2: -1}
support = remap(support, report.mapping, student_vocab=V)

# %% TokenizerReport
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

tokenizer = Tokenizer(WordLevel({"yes": 0, "no": 1}))
report: TokenizerReport = check_tokenizers(tokenizer, tokenizer, teacher_vocab=64, probe=["yes"])
report.require()  # the verdict is "same"
assert report.code == "support = teacher_topk(teacher_logits[..., :2], k)"

# %% Vocabulary
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

tokenizer = Tokenizer(WordLevel({"Ġyes": 0, "no": 1}))
vocabulary: Vocabulary = check_tokenizers(tokenizer, tokenizer, probe=["no"]).student
assert vocabulary.spelled == {0: b" yes", 1: b"no"}

# %% Verdict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

tokenizer = Tokenizer(WordLevel({"yes": 0, "no": 1}))
worst: Verdict = "remap"
check_tokenizers(tokenizer, tokenizer, probe=["yes"]).require(worst)

# %% tokenizer_hash
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

tokenizer, other = (Tokenizer(WordLevel(ids)) for ids in ({"yes": 0, "no": 1}, {"yes": 1, "no": 0}))
assert tokenizer_hash(tokenizer) != tokenizer_hash(other)
# %% token_report
report = token_report(student, support, sampled, lambda ids: [f" {i}" for i in ids], weights=mask)
assert report.loss.shape == (B, T - 1)

# %% TokenReport
report: TokenReport = token_report(student, support, sampled, lambda ids: [f" {i}" for i in ids])
at = report.worst(1)[0]
print(report.loss_text(at), report.context(at, 5), report.token(at), report.p[at], report.q[at])

# %% save_html
import tempfile

report = token_report(student, support, sampled, lambda ids: [f" {i}" for i in ids])
with tempfile.TemporaryDirectory() as folder:
    save_html(report, f"{folder}/errors.html", title="Step 100")

# %% save_png
import tempfile

report = token_report(student, support, sampled, lambda ids: [f" {i}" for i in ids])
with tempfile.TemporaryDirectory() as folder:
    save_png(report, f"{folder}/errors.png", positions=[(0, 3)])
# %% VLLM
with VLLM("http://localhost:8000", "Qwen/Qwen3-32B", concurrency=16) as server:
    teacher = server.teacher(k=K)  # for distill; supports = server.score(prompts, k=K) for prompts

# %% SGLang
with SGLang("http://localhost:30000", api_key="secret") as server:
    teacher = server.teacher(k=K)

# %% Server
options = {"concurrency": 32, "retries": 8, "timeout": 120.0, "progress": True}
servers: list[Server] = [SGLang(f"http://localhost:{port}", **options) for port in (30000, 30001)]

# %% ScoringError
try:
    supports = SGLang("http://localhost:9", retries=0).score([[1, 2, 3]], k=K)
except ScoringError as error:
    supports = error.done  # by the place of the prompt; error.index is that of the one that failed

# %% from_vllm
row = {"7": {"logprob": -4.0}, "3": {"logprob": -0.1}, "5": {"logprob": -2.9}}  # the actual token first
received = from_vllm({"choices": [{"prompt_logprobs": [None, row]}]}, k=2)  # of a prompt of two tokens
assert received.ids.tolist() == [[3, 5], [-1, -1]]

# %% from_vllm_scores
answer = {"prompt_token_id_logprobs": torch.tensor([[-2.9, -0.1]])}  # JSON has base64 of a .npy file
assert from_vllm_scores(answer, token_ids=[[5, 3]], start=0).ids.tolist() == [[3, 5], [-1, -1]]

# %% from_sglang
answer = {"meta_info": {"input_top_logprobs": [None, [[-0.1, 3, None], [-2.9, 5, None]]]}}
assert from_sglang(answer, k=2).ids.tolist() == [[3, 5], [-1, -1]]

# %% from_openai
top = [{"token_id:3": -0.1, "token_id:5": -2.9}]  # of one token that was drawn
answer = {"choices": [{"logprobs": {"tokens": ["token_id:3"], "top_logprobs": top}}]}
assert from_openai(answer, k=2).ids.tolist() == [[3, 5]]

# %% from_trtllm
row = {3: {"logprob": -0.1}, 5: {"logprob": -2.9}}  # objects with a logprob, in the engine's own result
assert from_trtllm({"outputs": [{"prompt_logprobs": [row]}]}, k=2).ids.tolist() == [[3, 5]]

# %% from_tinker
answer = {"topk_prompt_logprobs": [None, [(3, -0.1), (5, -2.9)]]}
assert from_tinker(answer, k=2).ids.tolist() == [[3, 5], [-1, -1]]

# %% from_llama_cpp
best = [{"id": 3, "token": " a", "logprob": -0.1}, {"id": 5, "token": " b", "logprob": -2.9}]
answer = {"completion_probabilities": [{**best[0], "top_logprobs": best}]}
assert from_llama_cpp(answer, k=2).ids.tolist() == [[3, 5]]

# %% alignment
input_ids = torch.randint(V, (40,))
received = Support(input_ids.roll(-1)[:, None].int(), torch.zeros(40, 1))  # of a teacher that is always right
shares = alignment(received, input_ids)
assert shares[1] > 0.9 > shares[0]
# %% Header
header = Header(K, V, teacher="a model", tokenizer="0" * 64, source="some prompts")
assert header.log_probs_dtype == "float16"

# %% Row
row = Row(sampled[0], teacher_topk(teacher[0], K, normalize=True), loss_mask=torch.arange(T) >= 3)

# %% Writer
from tempfile import mkdtemp

header = Header(K, V, teacher="a model", tokenizer="0" * 64, source="some prompts")
rows = [Row(sampled[i], teacher_topk(teacher[i], K, normalize=True)) for i in range(B)]
with Writer(mkdtemp(), header) as writer:
    for i in range(writer.rows, B):  # from the row after those that are stored
        writer.append(rows[i : i + 1])
    writer.finish()

# %% Store
from tempfile import mkdtemp

folder = mkdtemp()
with Writer(folder, Header(K, V, teacher="a model", tokenizer="0" * 64, source="some prompts")) as writer:
    writer.append([Row(sampled[0], teacher_topk(teacher[0], K, normalize=True))])
    writer.finish()
store = Store(folder, check="full")
assert len(store) == 1 and torch.equal(store[0].input_ids, sampled[0])

# %% StoreDataset
from tempfile import mkdtemp

folder = mkdtemp()
with Writer(folder, Header(K, V, teacher="a model", tokenizer="0" * 64, source="some prompts")) as writer:
    writer.append([Row(sampled[0], teacher_topk(teacher[0], K, normalize=True))])
    writer.finish()
data = StoreDataset(folder, shuffle=True)
data.set_epoch(1)
loader = torch.utils.data.DataLoader(data, batch_size=8, collate_fn=Collator(pad_token_id=0))
assert len(list(loader)) == 1

# %% Collator
rows = [Row(sampled[0], support[0]), Row(sampled[1, :3], support[1, :3])]
batch = Collator(pad_token_id=0)(rows)
loss = causal_topk_reverse_kl(student, Support.from_dict(batch), batch["labels"])

# %% axolotl
example = {
    "input_ids": [5, 6, 7],
    "target_token_ids": [[6, 8], [7, 9], [0, 1]],
    "target_logprobs": [[-0.1, -2.4], [-0.2, -1.7], [-1e30, -1e30]],
    "target_mask": [[1, 1], [1, 1], [0, 0]],
}
(row,) = axolotl([example], speaks_of="next")
assert row.support.ids.tolist() == [[6, 8], [7, 9], [-1, -1]]

# %% distillkit
from tempfile import mkdtemp

import pyarrow
import pyarrow.parquet

lists = pyarrow.list_(pyarrow.list_(pyarrow.uint8()))
tokens = pyarrow.list_(pyarrow.uint64())
schema = pyarrow.schema({"input_ids": tokens, "compressed_logprobs": lists, "bytepacked_indices": lists})
packed = torch.tensor([[-0.5]]).view(torch.uint8).tolist()  # of one token, K = 1
example = {"input_ids": [3, 4], "compressed_logprobs": packed, "bytepacked_indices": [[4]]}
folder = mkdtemp()
pyarrow.parquet.write_table(pyarrow.Table.from_pylist([example], schema), f"{folder}/data_0.parquet")
(row,) = distillkit(folder, {"d": 256, "k": 1, "exact_k": 1, "residual_bins": []})
assert row.support.ids.tolist() == [[4], [-1]] and row.support.log_probs[0] == -0.5

# %% megatron
import io
import tarfile
from tempfile import mkdtemp

import pyarrow

folder, plain, packed = mkdtemp(), io.BytesIO(), pyarrow.BufferOutputStream()
ids = torch.randint(V, (T, 1, K))  # of one sample of T tokens
answers = {"values": torch.zeros(T, 1, K) - 3, "indices_low": ids.to(torch.uint16), "bit_17": ids >= 2**16}
torch.save({**answers, "format_version": 2}, plain)
with pyarrow.CompressedOutputStream(packed, "zstd") as out:
    out.write(plain.getvalue())
data = packed.getvalue().to_pybytes()
with tarfile.open(f"{folder}/dp0__0-1.tar", "w") as tar:
    member = tarfile.TarInfo("0-1.pt.zst")
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
(row,) = megatron(folder, [sampled[0]])
assert torch.equal(row.support.ids, ids[:, 0])
