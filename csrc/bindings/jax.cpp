// JAX: handlers of XLA's foreign function interface.
#include <cstring>

#include "params.h"
#include "xla_ffi.h"

extern "C" {

// The minor version of the FFI API that the handlers report. XLA rejects versions that it no longer
// supports; ops/native/jax.py, which registers the handlers, then retries with the next one.
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

// At registration XLA queries the version with a frame without an `api`. Returns whether this is
// that query.
bool report_version(const CallFrame* frame) {
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

// The value of an attribute if it has this name and type, else null.
const void* attribute(const Attributes& attributes, int index, const char* name,
                      AttributeType type) {
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

// Decodes a call frame and calls execute(params, batch, threads, input data, output data), which
// returns 0, or nonzero if out of memory.
template <int kInputs, int kOutputs, class Execute>
Error* handle(const CallFrame* frame, Execute execute) {
  if (report_version(frame)) return nullptr;
  if (frame->struct_size < offsetof(CallFrame, attrs) + sizeof(Attributes))
    return error(frame, UNIMPLEMENTED, "involution: call frame of an unsupported XLA version");
  if (frame->stage != EXECUTE)
    return error(frame, UNIMPLEMENTED, "involution: only the execution stage is supported");
  if (!all_buffers(frame->args, kInputs) || !all_buffers(frame->rets, kOutputs) ||
      frame->attrs.size != 2 || buffer(frame->args, 0).rank < 1)
    return error(frame, INVALID_ARGUMENT, "involution: arguments of another version");
  const auto* const params = static_cast<const Array*>(attribute(frame->attrs, 0, "params", ARRAY));
  const auto* const threads =
      static_cast<const Scalar*>(attribute(frame->attrs, 1, "threads", SCALAR));
  if (params == nullptr || params->dtype != S64 || params->size != INVOLUTION_PARAMS_SIZE ||
      threads == nullptr || threads->dtype != S32)
    return error(frame, INVALID_ARGUMENT, "involution: parameters of another version");
  const void* inputs[kInputs];
  void* outputs[kOutputs];
  for (int i = 0; i < kInputs; ++i) inputs[i] = buffer(frame->args, i).data;
  for (int i = 0; i < kOutputs; ++i) outputs[i] = buffer(frame->rets, i).data;
  if (execute(static_cast<const InvolutionParams*>(params->data), buffer(frame->args, 0).dims[0],
              *static_cast<const std::int32_t*>(threads->value), inputs, outputs))
    return error(frame, RESOURCE_EXHAUSTED, "involution: out of memory");
  return nullptr;
}

}  // namespace

Error* involution_jax(CallFrame* frame) {
  return handle<2, 1>(frame, [](const InvolutionParams* params, std::int64_t batch, int threads,
                                const void* const* in, void* const* out) {
    return involution_execute(params, batch, threads, in[0], in[1], out[0]);
  });
}

Error* involution_jax_fused(CallFrame* frame) {
  return handle<4, 2>(frame, [](const InvolutionParams* params, std::int64_t batch, int threads,
                                const void* const* in, void* const* out) {
    return involution_execute_fused(params, batch, threads, in[0], in[1], in[2], in[3], out[0],
                                    out[1]);
  });
}
