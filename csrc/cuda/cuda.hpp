// The ops on a GPU, for the renormalised reverse KL.
//
// Pointers are of the device; nothing is allocated and nothing is waited for. Logits, out, and the hidden states of
// linear_loss may come in slabs, other matrices in one.
#pragma once

#include "../ops.hpp"

namespace topk_rkl::cuda {

constexpr int MAX_K = 1024;

struct Where {
  int device;
  void* stream;
  void* scratch = nullptr;  // as many bytes as the op's function of that name asks for
};

void select(const Select& op, const Where& where);
int64_t select_scratch(const Select& op, int device);
void support_loss(const SupportLoss& op, const Where& where);
void select_loss(const SelectLoss& op, const Where& where);
int64_t select_loss_scratch(const SelectLoss& op, int device);
void scatter(const Scatter& op, const Where& where);
void linear_loss(const LinearLoss& op, const Where& where);
void linear_weight_grad(const LinearWeightGrad& op, const Where& where);  // of fewer than 2^31 slots
int64_t linear_weight_grad_scratch(const LinearWeightGrad& op, int device);

}  // namespace topk_rkl::cuda
