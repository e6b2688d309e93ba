// The ops on the CPU, and the choice of an instruction set.
#pragma once

#include <string>
#include <vector>

#include "../ops.hpp"
#include "simd/isa.hpp"

namespace topk_rkl {

// The instruction sets built in that this machine has, the best first; and the choice of one, for tests.
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& name);
const Isa& current_isa();

void select(const Select& op, int threads);
void support_loss(const SupportLoss& op, int threads);
void select_loss(const SelectLoss& op, int threads);
void scatter(const Scatter& op, int threads);
void tail_logit(const TailLogit& op, int threads);
void mass_loss(const MassLoss& op, int threads);
void mass_grad(const MassGrad& op, int threads);
void linear_loss(const LinearLoss& op, int threads);
void linear_logits(const LinearLogits& op, int threads);
void linear_hidden_grad(const LinearHiddenGrad& op, int threads);
void linear_weight_grad(const LinearWeightGrad& op, int threads);  // of fewer than 2^32 slots

}  // namespace topk_rkl
