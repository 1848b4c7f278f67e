#include "files.h"

#include <sched.h>
#include <sys/stat.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>

#include "error.h"

namespace driffusion {
namespace {

using Handle = std::unique_ptr<std::FILE, int (*)(std::FILE *)>;

Handle opened(const std::string &path, driffusion_status status) {
    Handle file(std::fopen(path.c_str(), "rbe"), std::fclose);
    if (!file) fail(status, path + " cannot be opened: " + std::strerror(errno));
    struct stat about;
    if (fstat(fileno(file.get()), &about) || !S_ISREG(about.st_mode)) fail(status, path + " is no file");
    return file;
}

std::string trimmed(const std::string &text) {
    auto first = text.find_first_not_of(" \t"), last = text.find_last_not_of(" \t");
    return first == text.npos ? "" : text.substr(first, last - first + 1);
}

}  // namespace

std::string read_file(const std::string &path, driffusion_status status, u64 most) {
    Handle file = opened(path, status);
    std::string content;
    char part[1 << 16];
    while (std::size_t count = std::fread(part, 1, sizeof part, file.get())) {
        content.append(part, count);
        if (content.size() > most) fail(status, path + " is larger than " + std::to_string(most) + " bytes");
    }
    if (std::ferror(file.get())) fail(status, path + " cannot be read: " + std::strerror(errno));
    return content;
}

std::string read_checked(const std::string &folder, const Program &program, const File &file, bool keep) {
    const std::string path = folder + "/" + program.string(file.name);
    Handle handle = opened(path, DRIFFUSION_ERROR_BUNDLE);
    struct stat about;
    if (fstat(fileno(handle.get()), &about) || u64(about.st_size) != file.size) {
        fail(DRIFFUSION_ERROR_BUNDLE, path + " is not the file that the program was written for (its size differs): write the program again");
    }
    std::string content(keep ? std::size_t(file.size) : std::size_t(1) << 20, '\0');
    Sha256 hash;
    for (u64 done = 0; done < file.size;) {
        char *to = content.data() + (keep ? done : 0);
        std::size_t count = std::fread(to, 1, std::size_t(std::min<u64>(file.size - done, 1 << 20)), handle.get());
        if (!count) fail(DRIFFUSION_ERROR_BUNDLE, path + " cannot be read to its end");
        hash.update(to, count);
        done += count;
    }
    if (hash.finish() != file.sha256) {
        fail(DRIFFUSION_ERROR_BUNDLE, path + " is not the file that the program was written for (its sha256 differs): write the program again");
    }
    return content;
}

std::string machine() {
    struct utsname names;
    if (uname(&names)) return "";
    std::string name = names.machine, flags;
    std::map<std::string, std::string> facts;
    std::ifstream cpuinfo("/proc/cpuinfo");
    for (std::string line; std::getline(cpuinfo, line);) {
        auto colon = line.find(':');
        if (colon != line.npos) facts[trimmed(line.substr(0, colon))] = trimmed(line.substr(colon + 1));
    }
    if (facts.count("model name")) name = facts["model name"];
    flags = facts.count("flags") ? facts["flags"] : facts["Features"];
    std::vector<std::string> words;
    std::istringstream stream(flags);
    for (std::string word; stream >> word;) words.push_back(word);
    std::sort(words.begin(), words.end());
    std::string sorted;
    for (const std::string &word : words) sorted += (sorted.empty() ? "" : " ") + word;
    return std::string(names.sysname) + " " + name + " (" + hex(sha256(sorted.data(), sorted.size())).substr(0, 8) + ")";
}

u32 cores() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : u32(CPU_COUNT(&set));
}

}  // namespace driffusion
