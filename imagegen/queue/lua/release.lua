-- Hands claims back: a new entry takes the place of each old one, which wakes a reader elsewhere at once.
--
-- KEYS  1 stream; then two a task: record, run
-- ARGV  1 group; 2 consumer to remove where it holds nothing more, else ''; 3 life of a run in ms;
--       then five a task: entry id, version, generation, entry JSON, run JSON
-- returns the number of entries handed back
local stream, group, count = KEYS[1], ARGV[1], 0
for i = 0, (#KEYS - 1) / 2 - 1 do
  local record, run, at = KEYS[i * 2 + 2], KEYS[i * 2 + 3], 4 + i * 5
  local entry, version, generation, entry_json, run_json =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  if redis.call('XDEL', stream, entry) == 1 then
    redis.call('XACK', stream, group, entry)
    local again = redis.call('XADD', stream, '*', 'v', version, 'g', generation, 'd', entry_json)
    if run_json ~= '' then redis.call('SET', run, again .. ' ' .. run_json, 'PX', ARGV[3]) end
    local known = redis.call('GET', record)
    if known then
      local before, after = string.match(known, '^(%d+ %l+ )%S+( .*)$')
      if before then redis.call('SET', record, before .. again .. after, 'KEEPTTL') end
    end
    count = count + 1
  end
end
if ARGV[2] ~= '' then
  local left = redis.pcall('XPENDING', stream, group, '-', '+', 1, ARGV[2])
  if not left.err and #left == 0 then redis.call('XGROUP', 'DELCONSUMER', stream, group, ARGV[2]) end
end
return count
