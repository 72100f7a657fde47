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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(involution_jax, run,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const std::int64_t>>("numbers")
                                  .Attr<std::int32_t>("threads"));
