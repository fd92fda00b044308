-- Lists the ids of the first unclaimed entries, and counts the entries behind them.
--
-- KEYS    1 stream
-- ARGV    1 group; 2 maximum of ids; 3 bytes after which no more are listed: each is read with its request
-- result  ids; number of entries behind them; id of the last entry, '' if there is none behind; number of commands
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then return {{}, 0, '', 2} end
local last, claimed = '0-0', 0
for _, group in ipairs(groups) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  if fields['name'] == ARGV[1] then last, claimed = fields['last-delivered-id'], fields['pending'] end
end
local ids, bytes, commands, PAGE = {}, tonumber(ARGV[3]), 2, 16
repeat
  local most = math.min(PAGE, tonumber(ARGV[2]) - #ids)
  local entries = redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', most)
  for _, entry in ipairs(entries) do
    ids[#ids + 1], last = entry[1], entry[1]
    for _, value in ipairs(entry[2]) do bytes = bytes - #value end
  end
  commands = commands + 1
  if #entries < most then return {ids, 0, '', commands} end
until bytes <= 0 or #ids == tonumber(ARGV[2])
local behind = redis.call('XLEN', KEYS[1]) - claimed - #ids
if behind <= 0 then return {ids, 0, '', commands + 1} end
return {ids, behind, redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1][1], commands + 2}
