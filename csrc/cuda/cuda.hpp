// The functions of the backend on a GPU. See topk_rkl/backends/reference.py for what they mean.
//
// Pointers are of the device; nothing is allocated and nothing is waited for. `scratch` is as many bytes as the function
// of its name asks for. Logits, out, and the hidden states of linear_loss may come in slabs, other matrices in one.
#pragma once

#include "../cpu/types.hpp"

namespace topk_rkl::cuda {

constexpr int MAX_K = 1024;

struct Where {
  int device;
  void* stream;
};

int64_t select_scratch(int64_t n, int64_t vocab, Kind kind, int64_t k, bool normalize, int device);

void select(const Matrix& logits, int64_t n, int64_t k, bool normalize, void* scratch,
            int32_t* ids,   // (n, k)
            float* values,  // (n, k)
            const Where& where);

void support_loss(const Matrix& student, int64_t n, int64_t k, const Matrix& ids, const Matrix& values,
                  const Vector& weights, double temperature,
                  float* loss,  // (n)
                  float* g,     // (n, k)
                  const Where& where);

// With the scratch of a selection that does not normalize.
void select_loss(const Matrix& student, const Matrix& teacher, int64_t n, int64_t k, const Vector& weights,
                 double temperature, void* scratch,
                 float* loss,   // (n)
                 int32_t* ids,  // (n, k)
                 float* g,      // (n, k)
                 const Where& where);

// g is float32. `unique` says that no row has an id twice.
void scatter(const Matrix& g, const Matrix& ids, const Vector& grad_output, const Matrix& out, int64_t n, int64_t k,
             bool unique, const Where& where);

// softcap 0 is none; dhidden may be null.
void linear_loss(const Matrix& hidden, const Matrix& head, int64_t vocab, const Vector& bias, int64_t n, int64_t k,
                 const Matrix& ids, const Matrix& values, const Vector& weights, double temperature,
                 double logit_scale, double softcap,
                 float* loss,     // (n)
                 float* g,        // (n, k)
                 float* dhidden,  // (n, hidden.columns)
                 const Where& where);

int64_t linear_weight_grad_scratch(int64_t n, int64_t k, int64_t vocab, int64_t width, int device);

// n k is below 2^31. dhead (vocab, hidden.columns) and dbias (vocab) may have null data.
void linear_weight_grad(const float* g,  // (n, k)
                 const Matrix& ids, const Matrix& hidden, int64_t n, int64_t k, int64_t vocab, const Matrix& dhead,
                 const Vector& dbias, void* scratch, const Where& where);

}  // namespace topk_rkl::cuda
