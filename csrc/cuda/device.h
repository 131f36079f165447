// What the kernels need of CUDA, so that the same source also compiles for the host: nvcc takes the words as they are,
// csrc/tests/emulate.h gives them a meaning on the CPU before a kernel's header is included.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define INTERFUSE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define INTERFUSE_DEVICE __device__ __forceinline__
// Arrays indexed by an unrolled loop stay in registers.
#define INTERFUSE_UNROLL _Pragma("unroll")
#define INTERFUSE_ROLLED _Pragma("unroll 1")
#define INTERFUSE_SHARED(type, name) __shared__ type name
#define INTERFUSE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]

namespace interfuse {
namespace cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;
using Words = uint4;

INTERFUSE_DEVICE float to_float(float value) { return value; }
INTERFUSE_DEVICE float to_float(BFloat16 value) { return __bfloat162float(value); }
INTERFUSE_DEVICE float to_float(Float16 value) { return __half2float(value); }
INTERFUSE_DEVICE void put(float* p, float value) { *p = value; }
INTERFUSE_DEVICE void put(BFloat16* p, float value) { *p = __float2bfloat16_rn(value); }
INTERFUSE_DEVICE void put(Float16* p, float value) { *p = __float2half_rn(value); }
INTERFUSE_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
INTERFUSE_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
INTERFUSE_DEVICE uint32_t tf32_bits(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
INTERFUSE_DEVICE float exponential(float value) { return __expf(value); }
INTERFUSE_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
INTERFUSE_DEVICE float hyperbolic_tangent(float value) { return tanhf(value); }

// ---- blocks of a cluster ----------------------------------------------------------------------------------------
// A mailbox is an mbarrier: a phase of it ends when its block has said how many bytes to expect and they have come.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
INTERFUSE_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

INTERFUSE_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
INTERFUSE_DEVICE void open_mailbox(uint64_t* mailbox) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                   shared_address(mailbox))
               : "memory");
}
INTERFUSE_DEVICE void expect(uint64_t* mailbox, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mailbox)), "r"(bytes)
               : "memory");
}
INTERFUSE_DEVICE void wait_mailbox(uint64_t* mailbox, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(mailbox)), "r"(parity)
        : "memory");
}
// What this thread wrote to shared memory becomes visible to the copy engine; a barrier must follow.
INTERFUSE_DEVICE void before_sending() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Copies a piece of this block's shared memory to the same place of a peer and reports it to the same mailbox there.
INTERFUSE_DEVICE void send(const void* at, uint32_t bytes, uint64_t* mailbox, int rank) {
  const uint32_t from = shared_address(at), box = shared_address(mailbox);
  uint32_t to, there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(from), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(box), "r"(rank));
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "r"(bytes), "r"(there)
               : "memory");
}
#else
// Ampere has no clusters: a team's blocks are clusters of one, which never come here.
INTERFUSE_DEVICE void cluster_barrier() {}
INTERFUSE_DEVICE void open_mailbox(uint64_t*) {}
INTERFUSE_DEVICE void expect(uint64_t*, uint32_t) {}
INTERFUSE_DEVICE void wait_mailbox(uint64_t*, uint32_t) {}
INTERFUSE_DEVICE void before_sending() {}
INTERFUSE_DEVICE void send(const void*, uint32_t, uint64_t*, int) {}
#endif

// ---- blocks that meet through global memory ---------------------------------------------------------------------

// One thread of a block, after a barrier: everything its block wrote is visible to who sees the flag.
INTERFUSE_DEVICE void raise_flag(uint32_t* flag) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory");
}
INTERFUSE_DEVICE void wait_flag(const uint32_t* flag, uint32_t value) {
  uint32_t seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  while (seen < value);
}
// Past the first-level cache, which does not see what other multiprocessors write.
INTERFUSE_DEVICE Words read_fresh(const Words* p) { return __ldcg(p); }

// ---- the matrix unit: acc += A B, 16 rows and 8 columns, 16 deep (8 in float32, as TF32) --------------------------

INTERFUSE_DEVICE void multiply(BFloat16, float* acc, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
INTERFUSE_DEVICE void multiply(Float16, float* acc, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
INTERFUSE_DEVICE void multiply(float, float* acc, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace cuda
}  // namespace interfuse
#endif
