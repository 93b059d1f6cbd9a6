// The CUDA row kernels behind a C interface, run on the CPU through the shim; see test_cuda.py.
#define DS_ALIGN_CPU_SHIM 1
#include "cuda/logprob_kernels.cuh"

namespace {

using namespace ds_align;

struct Arguments {
  const void* logits;
  int64_t logits_stride, num_rows, num_columns;
  const int64_t* labels;
  int64_t first;
  float* state;
  int64_t state_stride;
  const float* bias;
  float scale, softcap;
  const float* grad;
  void* out;
  int64_t out_stride;
  int statistics;
};

template <typename Logit, typename Out>
void lse(const Arguments& a) {
  const LseTile<Logit, float, Out> tile{static_cast<const Logit*>(a.logits),
                                        a.logits_stride,
                                        a.num_rows,
                                        a.num_columns,
                                        a.labels,
                                        a.first,
                                        a.state,
                                        a.state_stride,
                                        {a.bias, a.scale, a.softcap},
                                        static_cast<Out*>(a.out),
                                        a.out_stride,
                                        a.statistics};
  with_lse_kernel(
      tile, [&](auto kernel) { cuda_shim::launch(a.num_rows, kThreads, [&] { kernel(tile); }); });
}

template <typename Logit, typename Out>
void grad(const Arguments& a) {
  const GradTile<Logit, float, Out> tile{static_cast<const Logit*>(a.logits),
                                         a.logits_stride,
                                         a.num_rows,
                                         a.num_columns,
                                         a.labels,
                                         a.first,
                                         a.state,
                                         a.state_stride,
                                         {a.bias, a.scale, a.softcap},
                                         a.grad,
                                         static_cast<Out*>(a.out),
                                         a.out_stride};
  with_grad_kernel(
      tile, [&](auto kernel) { cuda_shim::launch(a.num_rows, kThreads, [&] { kernel(tile); }); });
}

}  // namespace

#define DS_ALIGN_INSTANCE(NAME, LOGIT, OUT)                               \
  extern "C" void lse_##NAME(const Arguments* a) { lse<LOGIT, OUT>(*a); } \
  extern "C" void grad_##NAME(const Arguments* a) { grad<LOGIT, OUT>(*a); }

DS_ALIGN_INSTANCE(float32_float32, float, float)
DS_ALIGN_INSTANCE(float32_bfloat16, float, __nv_bfloat16)
DS_ALIGN_INSTANCE(float32_float16, float, __half)
DS_ALIGN_INSTANCE(bfloat16_bfloat16, __nv_bfloat16, __nv_bfloat16)
DS_ALIGN_INSTANCE(float16_float16, __half, __half)
