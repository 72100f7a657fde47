// JAX: a handler of XLA's foreign function interface.
#include "involution.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

ffi::Error run(ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> result,
               ffi::Span<const std::int64_t> numbers, std::int32_t threads) {
  if (numbers.size() != INVOLUTION_NUMBERS)
    return ffi::Error::InvalidArgument("involution: numbers of another version");
  if (involution_run(numbers.begin(), a.dimensions()[0], threads, a.untyped_data(),
                     b.untyped_data(), result->untyped_data()))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "involution: memory ran out");
  return ffi::Error::Success();
}

// The second result has a type of its own.
ffi::Error run_fused(ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::AnyBuffer c, ffi::AnyBuffer d,
                     ffi::Result<ffi::AnyBuffer> result, ffi::Result<ffi::AnyBuffer> second,
                     ffi::Span<const std::int64_t> numbers, std::int32_t threads) {
  if (numbers.size() != INVOLUTION_FUSED_NUMBERS)
    return ffi::Error::InvalidArgument("involution: numbers of another version");
  if (involution_run_fused(numbers.begin(), a.dimensions()[0], threads, a.untyped_data(),
                           b.untyped_data(), c.untyped_data(), d.untyped_data(),
                           result->untyped_data(), second->untyped_data()))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "involution: memory ran out");
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(involution_jax, run,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const std::int64_t>>("numbers")
                                  .Attr<std::int32_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(involution_jax_fused, run_fused,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const std::int64_t>>("numbers")
                                  .Attr<std::int32_t>("threads"));
