// The functions of the backend, on the CPU. See topk_rkl/backends/reference.py for what they mean.
#pragma once

#include <string>
#include <vector>

#include "divergence.hpp"
#include "isa.hpp"

namespace topk_rkl {

// The instruction sets built in that this machine has, the best first; and the choice of one, for tests.
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& name);
const Isa& current_isa();

void select(const Matrix& logits, int64_t n, int64_t k, bool normalize, int threads,
            int32_t* ids,    // (n, k)
            float* values);  // (n, k)

void support_loss(const Matrix& student, int64_t n, int64_t k, const Matrix& ids, const Matrix& values,
                  const Vector& weights, double temperature, const Objective& objective, int threads,
                  float* loss,  // (n)
                  float* g);    // (n, k)

void select_loss(const Matrix& student, const Matrix& teacher, int64_t n, int64_t k, const Vector& weights,
                 double temperature, const Objective& objective, int threads,
                 float* loss,   // (n)
                 int32_t* ids,  // (n, k)
                 float* g);     // (n, k)

// With mass: ids ascend in a row, none twice, the negative ones last. `tail` and `out` are float64.
void tail_logit(const Matrix& logits, int64_t n, int64_t k, const Matrix& ids, double temperature, int threads,
          double* out);  // (n)

void mass_loss(const Matrix& student, int64_t n, int64_t k, const Matrix& ids, const Matrix& values, const Vector& tail,
               const Vector& weights, double temperature, const Objective& objective, int threads,
               float* loss,      // (n)
               float* g,         // (n, k)
               double* others);  // (n, 2)

// g, grad_output are float32, others float64; student may be out.
void mass_grad(const Matrix& g, const Matrix& ids, const Matrix& others, const Vector& grad_output, const Matrix& student,
            const Matrix& out, int64_t n, int64_t k, double temperature, int threads);

// g and grad_output are float32. `unique` says that no row has an id twice.
void scatter(const Matrix& g, const Matrix& ids, const Vector& grad_output, const Matrix& out, int64_t n, int64_t k,
             bool unique, int threads);

// softcap 0 is none; dhidden may be null.
void linear_loss(const Matrix& hidden, const Matrix& head, int64_t vocab, const Vector& bias, int64_t n, int64_t k,
                 const Matrix& ids, const Matrix& values, const Vector& weights, double temperature,
                 double logit_scale, double softcap, const Objective& objective, int threads,
                 float* loss,      // (n)
                 float* g,         // (n, k)
                 float* dhidden);  // (n, hidden.columns)

// g is float32, hidden has contiguous columns, and n k is below 2^32. dhead (vocab, hidden.columns) and
// dbias (vocab) may have null data.
void linear_weight_grad(const Matrix& g, const Matrix& ids, const Matrix& hidden, int64_t n, int64_t k,
                             int64_t vocab, const Matrix& dhead, const Vector& dbias, int threads);

class Slots;

// One row of the loss.
void loss_row(const Isa& isa, const Matrix& student, const Matrix& ids, const Matrix& values, int64_t row, int64_t k,
              double weight, double temperature, const Objective& objective, Slots& slots, float* loss, float* g);

// One row of the gradient, zeros included; `items` and `spare` hold k each.
void scatter_row(const Matrix& g, const Matrix& ids, double grad_output, const Matrix& out, int64_t row, int64_t k,
                 bool unique, bool streamed, uint64_t* items, uint64_t* spare);

}  // namespace topk_rkl
