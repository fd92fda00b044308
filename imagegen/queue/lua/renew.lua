-- Renews the leases of the entries that are still ours.
--
-- KEYS  1 stream; then one run a task
-- ARGV  1 group; 2 consumer; 3 life of a run in ms; then the entry ids, one a task
-- returns {the entry ids that are not ours any more, the entry ids that are ours but were not named}
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local ours, named, lost, unnamed, held = {}, {}, {}, {}, {}
local rows = redis.pcall('XPENDING', stream, group, '-', '+', 1000, consumer)
for _, row in ipairs(rows.err and {} or rows) do ours[row[1]] = true end
for i = 4, #ARGV do
  named[ARGV[i]] = true
  if ours[ARGV[i]] then
    held[#held + 1] = ARGV[i]
    redis.call('PEXPIRE', KEYS[i - 2], ARGV[3])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
for entry in pairs(ours) do if not named[entry] then unnamed[#unnamed + 1] = entry end end
if #held > 0 then
  held[#held + 1] = 'JUSTID'
  redis.call('XCLAIM', stream, group, consumer, 0, unpack(held))
end
return {lost, unnamed}
