// JAX: handlers of XLA's foreign function interface.
#include <cstring>

#include "involution.h"
#include "xla_ffi.h"

extern "C" {

// The minor version of the interface that the handlers say they are made for. XLA refuses versions
// that are too old for it; Python, which registers the handlers, then sets the next one.
INVOLUTION_EXPORT std::int32_t involution_jax_minor = involution::xla::OLDEST_MINOR;

INVOLUTION_EXPORT involution::xla::Error* involution_jax(involution::xla::CallFrame* frame);
INVOLUTION_EXPORT involution::xla::Error* involution_jax_fused(involution::xla::CallFrame* frame);
}

namespace {

using namespace involution::xla;

Error* error(const CallFrame* frame, ErrorCode code, const char* message) {
  ErrorArguments arguments = {offsetof(ErrorArguments, errc) + sizeof(ErrorCode), nullptr, message,
                              code};
  return frame->api->create_error(&arguments);
}

// At registration XLA asks for the version, in a frame without an `api`. Whether that is what it asks.
bool tell_version(const CallFrame* frame) {
  for (Extension* e = frame->extension_start; e != nullptr; e = e->next) {
    if (e->type != METADATA) continue;
    Metadata* const metadata = reinterpret_cast<MetadataExtension*>(e)->metadata;
    metadata->api_version.major_version = MAJOR;
    metadata->api_version.minor_version = involution_jax_minor;
    metadata->traits = 0;
    return true;
  }
  return false;
}

// The attribute's value if it is of that name and type.
const void* attribute(const Attributes& attributes, int index, const char* name, AttributeType type) {
  const Span& found = *attributes.names[index];
  const bool same = found.len == std::strlen(name) && std::memcmp(found.ptr, name, found.len) == 0;
  return same && attributes.types[index] == type ? attributes.attrs[index] : nullptr;
}

bool all_buffers(const Arguments& arguments, int count) {
  if (arguments.size != count) return false;
  for (int i = 0; i < count; ++i)
    if (arguments.types[i] != BUFFER) return false;
  return true;
}

const Buffer& buffer(const Arguments& arguments, int index) {
  return *static_cast<const Buffer*>(arguments.args[index]);
}

// Takes the frame apart, and calls run(numbers, batch, threads, data of the arguments, and of the
// results), which returns 0 unless memory ran out.
template <int Inputs, int Outputs, int Numbers, class Run>
Error* handle(const CallFrame* frame, Run run) {
  if (tell_version(frame)) return nullptr;
  if (frame->struct_size < offsetof(CallFrame, attrs) + sizeof(Attributes))
    return error(frame, UNIMPLEMENTED, "involution: a call frame of another XLA");
  if (frame->stage != EXECUTE)
    return error(frame, UNIMPLEMENTED, "involution: it has nothing to do before execution");
  if (!all_buffers(frame->args, Inputs) || !all_buffers(frame->rets, Outputs) ||
      frame->attrs.size != 2 || buffer(frame->args, 0).rank < 1)
    return error(frame, INVALID_ARGUMENT, "involution: arguments of another version");
  const auto* const numbers =
      static_cast<const Array*>(attribute(frame->attrs, 0, "numbers", ARRAY));
  const auto* const threads =
      static_cast<const Scalar*>(attribute(frame->attrs, 1, "threads", SCALAR));
  if (numbers == nullptr || numbers->dtype != S64 || numbers->size != Numbers ||
      threads == nullptr || threads->dtype != S32)
    return error(frame, INVALID_ARGUMENT, "involution: numbers of another version");
  const void* inputs[Inputs];
  void* outputs[Outputs];
  for (int i = 0; i < Inputs; ++i) inputs[i] = buffer(frame->args, i).data;
  for (int i = 0; i < Outputs; ++i) outputs[i] = buffer(frame->rets, i).data;
  if (run(static_cast<const std::int64_t*>(numbers->data), buffer(frame->args, 0).dims[0],
          *static_cast<const std::int32_t*>(threads->value), inputs, outputs))
    return error(frame, RESOURCE_EXHAUSTED, "involution: memory ran out");
  return nullptr;
}

}  // namespace

Error* involution_jax(CallFrame* frame) {
  return handle<2, 1, INVOLUTION_NUMBERS>(
      frame, [](const std::int64_t* numbers, std::int64_t batch, int threads,
                const void* const* in, void* const* out) {
        return involution_run(numbers, batch, threads, in[0], in[1], out[0]);
      });
}

// The second result has a type of its own.
Error* involution_jax_fused(CallFrame* frame) {
  return handle<4, 2, INVOLUTION_FUSED_NUMBERS>(
      frame, [](const std::int64_t* numbers, std::int64_t batch, int threads,
                const void* const* in, void* const* out) {
        return involution_run_fused(numbers, batch, threads, in[0], in[1], in[2], in[3], out[0],
                                    out[1]);
      });
}
