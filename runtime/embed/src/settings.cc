// What driffusion_open() is told, read and checked.
#include <algorithm>
#include <charconv>
#include <system_error>

#include "engine.h"
#include "error.h"
#include "files.h"

#ifndef DRIFFUSION_ONNXRUNTIME
#define DRIFFUSION_ONNXRUNTIME "libonnxruntime.so.1"
#endif

namespace driffusion {
namespace {

constexpr u32 MOST_LANES = 64;

u32 number(const std::string &key, const std::string &text, u32 low, u32 high) {
    u64 value = 0;
    bool digits = !text.empty() && text.size() < 10;
    for (char c : text) digits = digits && c >= '0' && c <= '9', value = value * 10 + u64(c - '0');
    if (!digits || value < low || value > high) {
        fail(DRIFFUSION_ERROR_ARGUMENT, key + " must be a whole number from " + std::to_string(low) + " to " + std::to_string(high) + ", not '" + text + "'");
    }
    return u32(value);
}

double seconds(const std::string &key, const std::string &text) {
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || !(value > 0 && value <= 1e6)) {
        fail(DRIFFUSION_ERROR_ARGUMENT, key + " must be a number of seconds above 0, such as 0.5 or 120, not '" + text + "'");
    }
    return value;
}

// cpu, cpu@THREADS, cpu*LANES: what `engines.devices` knows of processor cores.
void parse_devices(const std::string &text, Settings &settings) {
    const u32 all = cores();
    auto unknown = [&](const std::string &why) { fail(DRIFFUSION_ERROR_DEVICE, "unknown device '" + text + "': " + why); };
    std::string rest = text.substr(0, 3) == "cpu" ? text.substr(3) : "?";
    try {
        if (text.substr(0, 4) == "cuda") {
            settings.place_on_gpus(text);
        } else if (rest.empty()) {
            settings.lanes = 1, settings.threads = all;
        } else if (rest[0] == '@') {
            settings.lanes = 1, settings.threads = number("threads", rest.substr(1), 1, all);
        } else if (rest[0] == '*') {
            settings.lanes = number("lanes", rest.substr(1), 1, MOST_LANES);
            settings.threads = std::max(1u, all / settings.lanes);
        } else {
            unknown("use cpu, cpu@THREADS or cpu*LANES, or GPUs like cuda:0,cuda:1");
        }
    } catch (const Error &error) {
        if (error.status() != DRIFFUSION_ERROR_ARGUMENT) throw;
        unknown(error.what());
    }
}

}  // namespace

void Settings::place_on_gpus(const std::string &text) {
    for (std::size_t start = 0; start <= text.size();) {
        const std::size_t end = std::min(text.find(',', start), text.size());
        std::string one = text.substr(start, end - start);
        if (one.substr(0, 5) != "cuda:") fail(DRIFFUSION_ERROR_ARGUMENT, "use GPUs like cuda:0,cuda:1 or cuda:0*LANES");
        const std::size_t star = std::min(one.find('*'), one.size());
        const u32 each = star < one.size() ? number("lanes", one.substr(star + 1), 1, MOST_LANES) : 1;
        gpus.insert(gpus.end(), each, int(number("the GPU", one.substr(5, star - 5), 0, 1023)));
        start = end + 1;
    }
    if (gpus.size() > MOST_LANES) fail(DRIFFUSION_ERROR_ARGUMENT, "there are at most " + std::to_string(MOST_LANES) + " lanes");
    lanes = u32(gpus.size()), threads = cores();
}

Settings Settings::of(const driffusion_open_info &info) {
    Settings settings;
    settings.bundle = info.bundle, settings.program = info.program;
    settings.log = info.log, settings.log_user = info.log_user;
    settings.runtime = DRIFFUSION_ONNXRUNTIME;
    if (info.devices) parse_devices(info.devices, settings);
    for (std::size_t n = 0; n < info.option_count; ++n) {
        const char *raw_key = info.options[n].key, *raw_value = info.options[n].value;
        if (!raw_key || !raw_value) fail(DRIFFUSION_ERROR_ARGUMENT, "option " + std::to_string(n) + " has no key or no value");
        const std::string key = raw_key, value = raw_value;
        if (key == "threads") {
            settings.threads = number(key, value, 1, 1024);
        } else if (key == "spin_us") {
            settings.spin_seconds = number(key, value, 0, 100000) * 1e-6;
        } else if (key == "max_requests") {
            settings.max_requests = number(key, value, 1, 100000);
        } else if (key == "lane_timeout") {
            settings.lane_timeout = seconds(key, value);
        } else if (key == "plan" || key == "tensorrt") {
            (key == "plan" ? settings.plan : settings.tensorrt) = value;
        } else if (key == "onnxruntime") {
            settings.runtime = value;
        } else if (key == "compiled") {
            if (value != "auto" && value != "no") fail(DRIFFUSION_ERROR_ARGUMENT, "compiled must be auto or no, not '" + value + "'");
            settings.compiled = value == "auto";
        } else {
            fail(DRIFFUSION_ERROR_ARGUMENT, "unknown option '" + key + "': use threads, spin_us, max_requests, lane_timeout, plan, tensorrt, onnxruntime or compiled");
        }
    }
    return settings;
}

}  // namespace driffusion
