// The CUDA executor: same interface as HostExec (exec.h), on the current device and stream, scratch from torch's
// caching allocator, scans and sorts from CUB.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Macros.h>

#include <cub/cub.cuh>
#include <vector>

#include "hd.h"

namespace cvc {

namespace detail {

template <class F>
__global__ void __launch_bounds__(256) for_each_kernel(int64_t n, F f) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) f(i);
}

}  // namespace detail

class CudaExec {
 public:
  // `like` fixes the device; the current stream of that device is used throughout.
  explicit CudaExec(const torch::stable::Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  template <class T>
  T* alloc(int64_t n) {
    scratch_.push_back(torch::stable::new_empty(like_, {static_cast<int64_t>(sizeof(T)) * (n > 0 ? n : 1)},
                                                torch::headeronly::ScalarType::Byte));
    return static_cast<T*>(scratch_.back().mutable_data_ptr());
  }

  // The caching allocator hands the memory out again in the order of the stream.
  void free(const void* p) {
    std::erase_if(scratch_, [=](const torch::stable::Tensor& block) { return block.const_data_ptr() == p; });
  }

  int64_t memory_bytes() const {
    size_t available = 0, total = 0;
    STD_CUDA_CHECK(cudaMemGetInfo(&available, &total));
    return static_cast<int64_t>(total);
  }

  template <class F>
  void for_each(int64_t n, F f) {
    if (n <= 0) return;
    constexpr int64_t kThreads = 256, kMaxBlocks = int64_t{1} << 30;
    const int64_t blocks = min((n + kThreads - 1) / kThreads, kMaxBlocks);
    detail::for_each_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_>>>(n, f);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class T>
  void exclusive_scan(const T* in, T* out, int64_t n) {
    size_t bytes = 0;
    STD_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(nullptr, bytes, in, out, n, stream_));
    STD_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(alloc<char>(bytes), bytes, in, out, n, stream_));
  }

  template <class K, class V>
  void sort_pairs(const K* keys, K* keys_out, const V* values, V* values_out, int64_t n, int begin_bit = 0,
                  int end_bit = sizeof(K) * 8) {
    if (n <= 0) return;
    size_t bytes = 0;
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, keys_out, values, values_out, n, begin_bit,
                                                   end_bit, stream_));
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(alloc<char>(bytes), bytes, keys, keys_out, values, values_out, n,
                                                   begin_bit, end_bit, stream_));
  }

  template <class K>
  void sort_keys(const K* keys, K* keys_out, int64_t n, int begin_bit = 0, int end_bit = sizeof(K) * 8) {
    if (n <= 0) return;
    size_t bytes = 0;
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortKeys(nullptr, bytes, keys, keys_out, n, begin_bit, end_bit, stream_));
    STD_CUDA_CHECK(
        cub::DeviceRadixSort::SortKeys(alloc<char>(bytes), bytes, keys, keys_out, n, begin_bit, end_bit, stream_));
  }

  // Copies one value to the host: this synchronises the stream.
  template <class T>
  T read(const T* p) {
    T value;
    STD_CUDA_CHECK(cudaMemcpyAsync(&value, p, sizeof(T), cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return value;
  }

 private:
  torch::stable::Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<torch::stable::Tensor> scratch_;
};

}  // namespace cvc
