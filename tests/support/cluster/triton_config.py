"""Parse `config.pbtxt` with protobuf, as Triton does; a field unknown to Triton is an error.

Names and types are those of `model_config.proto` (triton-inference-server/common), for the fields
that we write. The text format does not contain field numbers, so those here are arbitrary.
"""

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, json_format, message_factory, text_format
from google.protobuf.descriptor_pool import DescriptorPool

ENUMS = {
    "DataType": ("TYPE_INVALID", "TYPE_INT32", "TYPE_INT64", "TYPE_FP64", "TYPE_STRING"),
    "Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}
MESSAGES = {
    "ModelInput": "string name, DataType data_type, int64* dims, bool optional",
    "ModelOutput": "string name, DataType data_type, int64* dims",
    "ModelInstanceGroup": "string name, Kind kind, int32 count, int32* gpus",
    "ModelTransactionPolicy": "bool decoupled",
    "ModelParameter": "string string_value",
    "Parameter": "string key, ModelParameter value",  # a map entry
    "ModelConfig": "string name, string backend, int32 max_batch_size, ModelInput* input, "
    "ModelOutput* output, ModelInstanceGroup* instance_group, Parameter* parameters, "
    "ModelTransactionPolicy model_transaction_policy",
}
FIELD = descriptor_pb2.FieldDescriptorProto


@cache
def _model_config() -> Any:
    """The message class ModelConfig."""
    file = descriptor_pb2.FileDescriptorProto(name="config", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, one in enumerate(fields.split(", "), 1):
            kind, field_name = one.split()
            field = message.field.add(name=field_name, number=number)
            field.label = FIELD.LABEL_REPEATED if kind.endswith("*") else FIELD.LABEL_OPTIONAL
            kind = kind.removesuffix("*")
            if kind in MESSAGES or kind in ENUMS:
                field.type = FIELD.TYPE_MESSAGE if kind in MESSAGES else FIELD.TYPE_ENUM
                field.type_name = kind
            else:
                field.type = FIELD.Type.Value(f"TYPE_{kind.upper()}")
    pool = DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ModelConfig"))


def parse(text: str) -> dict[str, Any]:
    """The configuration as the JSON that Triton passes to a model. Raises protobuf's ParseError."""
    message = text_format.Parse(text, _model_config()())
    config: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    config["parameters"] = {one["key"]: one["value"] for one in config["parameters"]}
    return config
