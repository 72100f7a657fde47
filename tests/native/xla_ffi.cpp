// Compares xla_ffi.h with the header of the installed jaxlib; compiled, never run.
#include "xla/ffi/api/c_api.h"
#include "xla_ffi.h"

using namespace involution::xla;

#define SAME_FIELD(ours, our_field, theirs, their_field)                          \
  static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field) &&     \
                sizeof(ours::our_field) == sizeof(theirs::their_field), #ours "::" #our_field)
#define SAME(ours, theirs, field) SAME_FIELD(ours, field, theirs, field)
#define SAME_VALUE(ours, theirs) static_assert(int(ours) == int(theirs), #ours)

// Another version of the API may have other fields: review it, then add it here and to
// NEWEST_MINOR in ops/native/jax.py.
static_assert(MAJOR == XLA_FFI_API_MAJOR && XLA_FFI_API_MINOR >= 1 && XLA_FFI_API_MINOR <= 3,
              "an unreviewed version of the API");

static_assert(sizeof(Extension) == sizeof(XLA_FFI_Extension_Base));
SAME(Extension, XLA_FFI_Extension_Base, struct_size);
SAME(Extension, XLA_FFI_Extension_Base, type);
SAME(Extension, XLA_FFI_Extension_Base, next);

static_assert(sizeof(Version) == sizeof(XLA_FFI_Api_Version));
SAME(Version, XLA_FFI_Api_Version, struct_size);
SAME(Version, XLA_FFI_Api_Version, major_version);
SAME(Version, XLA_FFI_Api_Version, minor_version);

static_assert(sizeof(ErrorArguments) == sizeof(XLA_FFI_Error_Create_Args));
static_assert(offsetof(ErrorArguments, errc) + sizeof(ErrorCode) ==
              XLA_FFI_Error_Create_Args_STRUCT_SIZE);
SAME(ErrorArguments, XLA_FFI_Error_Create_Args, struct_size);
SAME(ErrorArguments, XLA_FFI_Error_Create_Args, message);
SAME(ErrorArguments, XLA_FFI_Error_Create_Args, errc);

SAME(Api, XLA_FFI_Api, struct_size);
SAME(Api, XLA_FFI_Api, api_version);
SAME_FIELD(Api, create_error, XLA_FFI_Api, XLA_FFI_Error_Create);

static_assert(sizeof(Buffer) == sizeof(XLA_FFI_Buffer));
SAME(Buffer, XLA_FFI_Buffer, dtype);
SAME(Buffer, XLA_FFI_Buffer, data);
SAME(Buffer, XLA_FFI_Buffer, rank);
SAME(Buffer, XLA_FFI_Buffer, dims);

static_assert(sizeof(Span) == sizeof(XLA_FFI_ByteSpan));
SAME(Span, XLA_FFI_ByteSpan, ptr);
SAME(Span, XLA_FFI_ByteSpan, len);
SAME(Scalar, XLA_FFI_Scalar, dtype);
SAME(Scalar, XLA_FFI_Scalar, value);
SAME(Array, XLA_FFI_Array, dtype);
SAME(Array, XLA_FFI_Array, size);
SAME(Array, XLA_FFI_Array, data);

static_assert(sizeof(Arguments) == sizeof(XLA_FFI_Args));
static_assert(sizeof(Arguments) == sizeof(XLA_FFI_Rets));
SAME(Arguments, XLA_FFI_Args, size);
SAME(Arguments, XLA_FFI_Args, types);
SAME(Arguments, XLA_FFI_Args, args);
SAME(Arguments, XLA_FFI_Rets, size);
SAME(Arguments, XLA_FFI_Rets, types);
SAME_FIELD(Arguments, args, XLA_FFI_Rets, rets);

static_assert(sizeof(Attributes) == sizeof(XLA_FFI_Attrs));
SAME(Attributes, XLA_FFI_Attrs, size);
SAME(Attributes, XLA_FFI_Attrs, types);
SAME(Attributes, XLA_FFI_Attrs, names);
SAME(Attributes, XLA_FFI_Attrs, attrs);

static_assert(sizeof(CallFrame) == XLA_FFI_CallFrame_STRUCT_SIZE);
SAME(CallFrame, XLA_FFI_CallFrame, struct_size);
SAME(CallFrame, XLA_FFI_CallFrame, extension_start);
SAME(CallFrame, XLA_FFI_CallFrame, api);
SAME(CallFrame, XLA_FFI_CallFrame, stage);
SAME(CallFrame, XLA_FFI_CallFrame, args);
SAME(CallFrame, XLA_FFI_CallFrame, rets);
SAME(CallFrame, XLA_FFI_CallFrame, attrs);

SAME(Metadata, XLA_FFI_Metadata, struct_size);
SAME(Metadata, XLA_FFI_Metadata, api_version);
SAME(Metadata, XLA_FFI_Metadata, traits);
SAME(MetadataExtension, XLA_FFI_Metadata_Extension, extension_base);
SAME(MetadataExtension, XLA_FFI_Metadata_Extension, metadata);

SAME_VALUE(METADATA, XLA_FFI_Extension_Metadata);
SAME_VALUE(INVALID_ARGUMENT, XLA_FFI_Error_Code_INVALID_ARGUMENT);
SAME_VALUE(RESOURCE_EXHAUSTED, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
SAME_VALUE(UNIMPLEMENTED, XLA_FFI_Error_Code_UNIMPLEMENTED);
SAME_VALUE(S32, XLA_FFI_DataType_S32);
SAME_VALUE(S64, XLA_FFI_DataType_S64);
SAME_VALUE(BUFFER, XLA_FFI_ArgType_BUFFER);
SAME_VALUE(BUFFER, XLA_FFI_RetType_BUFFER);
SAME_VALUE(ARRAY, XLA_FFI_AttrType_ARRAY);
SAME_VALUE(SCALAR, XLA_FFI_AttrType_SCALAR);
SAME_VALUE(EXECUTE, XLA_FFI_ExecutionStage_EXECUTE);
