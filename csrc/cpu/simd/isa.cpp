// One instruction set: its name, whether this machine has it, and its functions.
#include "isa.hpp"

#define QUOTED(name) #name
#define NAME_OF(name) QUOTED(name)

namespace topk_rkl::TOPK_RKL_ISA {
namespace {

bool runs_here() {
#if defined(__AVX512BW__)
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return true;
#endif
}

}  // namespace

extern const Isa ISA = {NAME_OF(TOPK_RKL_ISA), runs_here, SELECT_ROW, slots_loss, HEAD_ROWS, ROW_BLOCKS};

}  // namespace topk_rkl::TOPK_RKL_ISA
