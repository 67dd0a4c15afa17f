// Which thread this is, and memory for all of them.
#pragma once
#include <stdint.h>

#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hfl {

inline int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Floats that begin at a multiple of 64 bytes. Raises std::bad_alloc.
class Floats {
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(operator new(static_cast<size_t>(count + 1) * 4, std::align_val_t{64}))) {}
  ~Floats() { operator delete(data_, std::align_val_t{64}); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;

  float* at(int64_t i) const { return data_ + i; }

 private:
  float* data_;
};

}  // namespace hfl
