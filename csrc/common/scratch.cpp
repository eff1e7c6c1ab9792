#include <torch/csrc/stable/library.h>

#include "common/buffer.h"

namespace cvc {
namespace {

// Gives kept scratch memory back to the system, in bytes: for measuring what a call needs.
int64_t release_scratch() { return static_cast<int64_t>(release_kept_pages()); }

}  // namespace
}  // namespace cvc

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) { m.def("release_scratch() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CompositeExplicitAutograd, m) {
  m.impl("release_scratch", TORCH_BOX(&cvc::release_scratch));
}
