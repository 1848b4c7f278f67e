// TensorRT's parser and plugins, as far as NVIDIA's bindings want them to be there: no test calls them.
#define ABSENT(name) \
    extern "C" __attribute__((visibility("default"))) void *name() { return nullptr; }
ABSENT(createNvOnnxParser_INTERNAL)
ABSENT(createNvOnnxParserRefitter_INTERNAL)
ABSENT(getNvOnnxParserVersion)
ABSENT(initLibNvInferPlugins)
