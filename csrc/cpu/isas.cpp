// Which of the instruction sets runs, decided when the module is loaded.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "cpu.hpp"

namespace topk_rkl {
namespace {

constexpr const Isa* ALL[] = {
#if defined(TOPK_RKL_X86)
    &avx512::ISA, &avx2::ISA,
#endif
    &portable::ISA};

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa =
      *std::find_if(std::begin(ALL), std::end(ALL), [](auto one) { return one->runs_here(); });
  return isa;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa* one : ALL)
    if (one->runs_here()) names.emplace_back(one->name);
  return names;
}

const Isa& current_isa() { return *chosen().load(); }

std::string isa() { return current_isa().name; }

void set_isa(const std::string& name) {
  for (const Isa* one : ALL)
    if (one->name == name && one->runs_here()) return chosen().store(one);
  throw std::invalid_argument("no instruction set '" + name + "' on this machine");
}

}  // namespace topk_rkl
