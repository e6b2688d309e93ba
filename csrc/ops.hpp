// The ops of a backend on the CPU and on a GPU. See topk_rkl/backends/reference.py for what they mean.
//
// The fields stand in the order of the arguments there. Python has checked their shapes, dtypes and devices. K is the
// number of columns of the ids.
#pragma once

#include "objective.hpp"

namespace topk_rkl {

struct Select {
  Matrix logits;  // (N, V)
  bool normalize;
  Rows<int32_t> ids;      // (N, K)
  Rows<float> log_probs;  // (N, K)
};

struct SupportLoss {
  Matrix student;    // (N, V)
  Matrix ids;        // (N, K)
  Matrix log_probs;  // (N, K)
  Vector weights;    // (N), or none
  Objective objective;
  float* loss;    // (N)
  Rows<float> g;  // (N, K)
};

struct SelectLoss {
  Matrix student;  // (N, V_student)
  Matrix teacher;  // (N, V)
  Vector weights;  // (N), or none
  Objective objective;
  float* loss;        // (N)
  Rows<int32_t> ids;  // (N, K)
  Rows<float> g;      // (N, K)
};

struct Scatter {
  Matrix g;            // (N, K) float32
  Matrix ids;          // (N, K)
  Vector grad_output;  // (N)
  Matrix out;          // (N, V)
  bool unique;         // no row has an id twice
};

// With mass: ids ascend in a row, none twice, the negative ones last.
struct TailLogit {
  Matrix logits;  // (N, V)
  Matrix ids;     // (N, K)
  double temperature;
  double* out;  // (N)
};

struct MassLoss {
  Matrix student;    // (N, V)
  Matrix ids;        // (N, K)
  Matrix log_probs;  // (N, K)
  Vector tail;       // (N)
  Vector weights;    // (N), or none
  Objective objective;
  float* loss;           // (N)
  Rows<float> g;         // (N, K)
  Rows<double> outside;  // (N, 2)
};

struct MassGrad {
  Matrix g;            // (N, K) float32
  Matrix ids;          // (N, K)
  Matrix outside;      // (N, 2) float64
  Vector grad_output;  // (N)
  Matrix student;      // (N, V), may be out
  double temperature;
  Matrix out;  // (N, V)
};

struct LinearLoss {
  Matrix hidden;     // (N, H)
  Matrix head;       // (V, H)
  Vector bias;       // (V), or none
  Matrix ids;        // (N, K)
  Matrix log_probs;  // (N, K)
  Vector weights;    // (N), or none
  Objective objective;
  float* loss;          // (N)
  Rows<float> g;        // (N, K)
  Rows<float> dhidden;  // (N, H), or none
};

struct LinearLogits {
  Matrix hidden;    // (N, H)
  Matrix head;      // (V, H)
  Vector bias;      // (V), or none
  Matrix ids;       // (N, K)
  Rows<float> out;  // (N, K)
};

struct LinearHiddenGrad {
  Rows<const float> g;  // (N, K)
  Matrix ids;           // (N, K)
  Matrix head;          // (V, H)
  Rows<float> out;      // (N, H)
};

struct LinearWeightGrad {
  Rows<const float> g;  // (N, K)
  Matrix ids;           // (N, K)
  Matrix hidden;        // (N, H)
  Matrix dhead;         // (V, H), or none
  Vector dbias;         // (V), or none

  TOPK_RKL_BOTH int64_t slots() const { return ids.rows * ids.columns; }
  TOPK_RKL_BOTH int64_t vocab() const { return dhead.data ? dhead.rows : dbias.size; }
};

}  // namespace topk_rkl
