#include <torch/csrc/stable/library.h>

#include "common/buffer.h"

namespace cvc {
namespace {

// Gives kept scratch memory back to the system, in bytes: for measuring what a call needs.
int64_t release_scratch() { return static_cast<int64_t>(release_kept_pages()); }

// Whether scratch memory is filled with NaN before it is used, for tests; returns whether it was.
bool poison_scratch(bool poison) { return std::exchange(poison_buffers, poison); }

}  // namespace
}  // namespace cvc

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("release_scratch() -> int");
  m.def("poison_scratch(bool poison) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CompositeExplicitAutograd, m) {
  m.impl("release_scratch", TORCH_BOX(&cvc::release_scratch));
  m.impl("poison_scratch", TORCH_BOX(&cvc::poison_scratch));
}
